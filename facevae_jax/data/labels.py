"""The attributes of a split in one table, whatever the images are: what editing and evaluation read."""

import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.config import DataConfig
from facevae_jax.data import dataset, pixels, synthetic
from facevae_jax.data.cache import local_dataset
from facevae_jax.data.layouts import Attribute
from facevae_jax.errors import UserError


class AttributeTable(NamedTuple):
    """Labels of the rows of a split."""

    attributes: tuple[Attribute, ...]
    values: Float32[np.ndarray, "n a"]  # in the order of the pixel store's rows; NaN where unknown

    def column(self, name: str) -> Float32[np.ndarray, " n"]:
        """The values of one attribute.

        Raises:
          UserError: there is no such attribute.
        """
        names = [attribute.name for attribute in self.attributes]
        if name not in names:
            raise UserError(f"the images have no attribute {name!r}; there are: {', '.join(names) or 'none'}.")
        return self.values[:, names.index(name)]


def open_attributes(config: DataConfig, split: str) -> AttributeTable:
    """The attributes of a split, `train` or `validation`, of the configured dataset.

    Raises:
      UserError: the dataset is not prepared, has no such split, or cannot be read.
    """
    if config.name == pixels.SYNTHETIC:
        drawn = synthetic.attributes(pixels.synthetic_rows(config, split))
        attributes = tuple(Attribute(attribute.name, attribute.kind) for attribute in synthetic.ATTRIBUTES)
        return AttributeTable(attributes, np.stack([drawn[attribute.name] for attribute in attributes], axis=1))
    directory = local_dataset(config)
    attributes = attribute_kinds(directory)
    columns = dataset.read_attributes(directory, split)
    count = dataset.split_sizes(directory).get(split, 0)
    values = np.stack([columns[attribute.name] for attribute in attributes], 1) if attributes else np.empty((count, 0))
    return AttributeTable(attributes, values.astype(np.float32))


def attribute_kinds(directory: pathlib.Path) -> tuple[Attribute, ...]:
    """The attributes of a prepared dataset, without their values.

    Raises:
      UserError: the dataset cannot be read.
    """
    described = dataset.read_metadata(directory)["attributes"]
    return tuple(Attribute(entry["name"], entry["kind"], tuple(entry.get("categories", ()))) for entry in described)
