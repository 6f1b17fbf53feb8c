"""The codes of many faces with their names and labels: of a split of the training data, or of photographs."""

import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import atomic_writer
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.random import named_key
from facevae_jax.data.dataset import AttributeTable, Dataset
from facevae_jax.data.feed import gather_rows
from facevae_jax.data.sources.photographs import list_photographs, photograph_blocks
from facevae_jax.inference import Encoded, Inference, encode
from facevae_jax.latents.moments import Moments, moments_of
from facevae_jax.latents.priors.base import normal_by_index
from facevae_jax.trained.artifacts import ArtifactStore
from facevae_jax.trained.labels import LabelColumns

MOMENT_IMAGES = 16_384  # of the training split that moments are computed from, at most


class CodeTable(NamedTuple):
    """Posteriors of flat codes, one row for each face."""

    posterior: Encoded
    names: tuple[str, ...]
    labels: AttributeTable


class CodeSource:
    """The codes of a model's own data, which priors are fitted to (`latents.priors.base.FitData`).

    Nothing is encoded before it is asked for; encoded splits and moments are kept as artifacts.
    """

    def __init__(
        self,
        inference: Inference,
        dataset: Dataset,
        artifacts: ArtifactStore,
        *,
        moments: Moments | None,
        mesh: Mesh,
        mirrors: bool,
    ) -> None:
        """Encodes by `inference`.

        Args:
          inference: the model.
          dataset: its data.
          artifacts: where codes are kept.
          moments: of an exported model, which may be used without its data.
          mesh: of the devices, on which priors may be fitted.
          mirrors: whether the model was trained on mirror images too.
        """
        self.code_shape, self.code_size = inference.code_shape, inference.code_size
        self.mesh, self._mirrors = mesh, mirrors
        self._inference, self._dataset, self._artifacts, self._moments = inference, dataset, artifacts, moments

    def table(self, split: str) -> CodeTable:
        """Posteriors of a split, with its labels.

        Raises:
          UserError: the data are not there, or have no such split.
        """
        return CodeTable(self.posterior(split), self._dataset.names(split), self._dataset.labels(split))

    def posterior(self, split: str, *, mirrored: bool = False) -> Encoded:
        """Posteriors of a split, or of its mirror images."""
        pixels, name = self._dataset.images(split), f"codes-{split}{'-mirrored' if mirrored else ''}"
        kept = self._artifacts.get(name)
        if kept is not None:
            return Encoded(kept.arrays["mean"], kept.arrays["log_variance"])
        blocks = image_blocks(pixels, self._inference.batch_size)
        if mirrored:
            blocks = (block[:, :, ::-1] for block in blocks)
        found = encode_all(self._inference, blocks, len(pixels))
        self._artifacts.put(name, found._asdict())
        return found

    def posteriors(self, split: str) -> Encoded:
        """Posteriors of `train`, then of its mirror images where the run mirrors; or of the `evaluation` split."""
        if split == "evaluation":
            return self.posterior(self._dataset.evaluation_split)
        parts = [self.posterior(split, mirrored=mirrored) for mirrored in (False, True)[: 1 + self._mirrors]]
        return Encoded(*map(np.concatenate, zip(*parts, strict=True)))

    @functools.cached_property
    def label_columns(self) -> LabelColumns:
        """How the labels of the training split become numbers."""
        return LabelColumns.of(self._dataset.labels("train"))

    def labels(self, split: str) -> Float32[np.ndarray, "n k"]:
        """Of the images of `posteriors(split)`."""
        of = self._dataset.evaluation_split if split == "evaluation" else split
        labels = self.label_columns.standardized(self._dataset.labels(of).values)
        return labels if split == "evaluation" else np.tile(labels, (1 + self._mirrors, 1))

    def unfinished(self, name: str) -> "UnfinishedFit":
        """The place of a fit that takes long."""
        return UnfinishedFit(self._artifacts, f"unfinished-{name}")

    def moments(self) -> Moments:
        """Of the aggregate posterior of the training split, or of its first `MOMENT_IMAGES`."""
        if self._moments is None and (kept := self._artifacts.get("moments")) is not None:
            self._moments = Moments(kept.arrays["mean"], kept.arrays["covariance"], kept.facts["images"])
        if self._moments is None:
            pixels = self._dataset.images("train")
            if len(pixels) <= MOMENT_IMAGES:  # whose codes the learned prior needs too
                posterior = self.posterior("train")
            else:
                blocks = image_blocks(pixels[:MOMENT_IMAGES], self._inference.batch_size)
                posterior = encode_all(self._inference, blocks, MOMENT_IMAGES)
            self._moments = moments_of(*posterior)
            mean, covariance, images = self._moments
            self._artifacts.put("moments", {"mean": mean, "covariance": covariance}, {"images": images})
        return self._moments

    def draws(self, split: str, *, at_least: int = 1) -> Float32[np.ndarray, "n z"]:
        """Draws from the posteriors of `train`, or of the `evaluation` split: the same number of each image."""
        posterior = self.posterior(self._dataset.evaluation_split if split == "evaluation" else split)
        times = -(-at_least // len(posterior.mean))
        return np.concatenate([posterior_sample(posterior, seed=seed) for seed in range(times)])


class UnfinishedFit(NamedTuple):
    """The state of a fit among the artifacts (`latents.priors.base.Unfinished`)."""

    artifacts: ArtifactStore
    name: str

    def load(self) -> dict[str, np.ndarray] | None:
        """What was saved last, if anything."""
        kept = self.artifacts.get(self.name)
        return kept.arrays if kept else None

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Replaces what was saved."""
        self.artifacts.put(self.name, arrays)

    def drop(self) -> None:
        """After the end."""
        self.artifacts.drop(self.name)


def posterior_sample(posterior: Encoded, *, seed: int = 0, first: int = 0) -> Float32[np.ndarray, "n ..."]:
    """A draw from each posterior; the first one is draw number `first` of the seed."""
    count, *shape = posterior.mean.shape
    noise = normal_by_index(named_key(seed, "posterior"), np.arange(first, first + count), math.prod(shape))
    return posterior.mean + np.exp(0.5 * posterior.log_variance) * np.asarray(noise).reshape(count, *shape)


def image_blocks(pixels: UInt8[np.ndarray, "n h w c"], size: int) -> Iterable[UInt8[np.ndarray, "b h w c"]]:
    """The images of a store in blocks of `size`."""
    starts = range(0, len(pixels), size)
    return (gather_rows(pixels, np.arange(at, min(at + size, len(pixels)))) for at in starts)


def encode_all(inference: Inference, blocks: Iterable[np.ndarray], count: int) -> Encoded:
    """The posteriors of `count` images that come in blocks."""
    found = Encoded(*(np.empty((count, inference.code_size), np.float32) for _ in range(2)))
    done = 0
    with progress_bar(total=count, description="encoding") as progress:
        for posterior in inference.map_stream(encode, blocks):
            rows = slice(done, done + len(posterior.mean))
            found.mean[rows], found.log_variance[rows] = posterior
            done = rows.stop
            progress.update(len(posterior.mean))
    return found


def encode_photographs(inference: Inference, paths: Sequence[str], *, resolution: int) -> CodeTable:
    """Posteriors of photographs, which are read as they are encoded; without labels.

    Raises:
      UserError: see `read_faces`.
    """
    files = list_photographs(paths)
    blocks = photograph_blocks(files, resolution=resolution, size=inference.batch_size)
    posterior = encode_all(inference, blocks, len(files))
    labels = AttributeTable((), np.empty((len(files), 0), np.float32))
    return CodeTable(posterior, tuple(map(str, files)), labels)


def write_npz(path: pathlib.Path, table: CodeTable) -> None:
    """Arrays `mean`, `log_variance`, `names`, `attributes` [n, a] and `attribute_names`, read without pickle."""
    with atomic_writer(path) as file:
        np.savez(
            file,
            mean=table.posterior.mean,
            log_variance=table.posterior.log_variance,
            names=np.array(table.names, dtype=np.str_),
            attributes=table.labels.values.astype(np.float32),
            attribute_names=np.array([attribute.name for attribute in table.labels.attributes], dtype=np.str_),
        )


def write_parquet(path: pathlib.Path, table: CodeTable) -> None:
    """One row a face: `name`, `mean` and `log_variance` as flat lists, and a column for each attribute.

    Raises:
      UserError: pyarrow is not installed; a label has the name of another column.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "facevae-jax[parquet]", or take .npz.') from error
    names = [name.encode(errors="replace").decode() for name in table.names]  # a file's name may be no UTF-8
    columns = {"name": arrow.array(names)}
    for name, values in table.posterior._asdict().items():
        columns[name] = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values[0].size)
    if taken := {attribute.name for attribute in table.labels.attributes} & columns.keys():
        raise UserError(f"--output={path.name}: the label {taken.pop()!r} has the name of another column: take .npz.")
    for number, attribute in enumerate(table.labels.attributes):
        columns[attribute.name] = arrow.array(table.labels.values[:, number], from_pandas=True)  # NaN becomes null
    described = {name: {"kind": kind, "categories": list(of)} for name, kind, of in table.labels.attributes}
    content = arrow.table(columns).replace_schema_metadata({"attributes": json.dumps(described)})
    with atomic_writer(path) as file:
        parquet.write_table(content, file)
