"""The latents of many faces with their names and labels: of a split of the training data, or of photographs."""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from facevae_jax.config import DataConfig
from facevae_jax.data import dataset, synthetic
from facevae_jax.data.batches import gather_rows
from facevae_jax.data.cache import local_dataset
from facevae_jax.data.labels import AttributeTable, attribute_kinds, open_attributes
from facevae_jax.data.layouts import Attribute
from facevae_jax.data.pixels import SYNTHETIC, open_split, open_splits
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer
from facevae_jax.generation.photographs import list_photographs, photograph_blocks
from facevae_jax.generation.trained import Faces, TrainedVAE
from facevae_jax.models.inference import Encoded
from facevae_jax.progress import progress_bar

DIRECTORY = "latents"
NO_LABELS = AttributeTable((), np.empty((0, 0), np.float32))


class LatentTable(NamedTuple):
    """Posteriors of faces, one row each."""

    mean: Float32[np.ndarray, "n z"]
    log_variance: Float32[np.ndarray, "n z"]
    names: tuple[str, ...]
    labels: AttributeTable

    @property
    def posterior(self) -> Encoded:
        """Means and log variances."""
        return Encoded(self.mean, self.log_variance)


def encode_photographs(trained: TrainedVAE, paths: Sequence[str]) -> LatentTable:
    """Posteriors of photographs, which are read as they are encoded; without labels.

    Raises:
      UserError: see `read_faces`.
    """
    files = list_photographs(paths)
    size = trained.inference.batch_size
    blocks = photograph_blocks(files, resolution=trained.resolution, size=size)
    posterior = _collect(trained, blocks, len(files))
    return LatentTable(*posterior, tuple(map(str, files)), NO_LABELS._replace(values=np.empty((len(files), 0))))


def identity(trained: TrainedVAE) -> str:
    """Names this model and what its data hold: a dataset that was prepared anew under its old name is another.

    Raises:
      UserError: the data are not there.
    """
    config = trained.config.data
    content = synthetic.VERSION if config.name == SYNTHETIC else dataset.fingerprint(local_dataset(config))
    return f"{trained.identity}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def encode_split(trained: TrainedVAE, split: str) -> LatentTable:
    """Posteriors of a split of the run's data, with its labels; kept in the run's folder for the next time.

    Raises:
      UserError: the data are not there, or have no such split.
    """
    kept = trained.folder / DIRECTORY / f"{split}_{identity(trained)}.npz"
    labels = open_attributes(trained.config.data, split)
    pixels = open_split(trained.config.data, split)
    found = _read_kept(kept, len(pixels), trained.latent_dim)
    if found is None:
        size = trained.inference.batch_size
        starts = range(0, len(pixels), size)
        blocks = (gather_rows(pixels, np.arange(at, min(at + size, len(pixels)))) for at in starts)
        found = _collect(trained, blocks, len(pixels))
        _keep(kept, found)
    return LatentTable(*found, row_names(trained.config.data, split, len(pixels)), labels)


def attributes_of(trained: TrainedVAE) -> tuple[Attribute, ...]:
    """The labels that the run's data have, without their values."""
    config = trained.config.data
    if config.name == SYNTHETIC:
        return open_attributes(config, "validation").attributes
    return attribute_kinds(local_dataset(config))


def evaluation_split(trained: TrainedVAE) -> str:
    """The split that the run was evaluated on: `validation`, or `train` where the data have no other."""
    return open_splits(trained.config.data).evaluation_split


def split_size(trained: TrainedVAE, split: str) -> int:
    """Images in a split of the run's data."""
    return len(open_split(trained.config.data, split))


def read_rows(trained: TrainedVAE, split: str, rows: Sequence[int]) -> Faces:
    """Some images of a split of the run's data.

    Raises:
      UserError: the data are not there, or have no such rows.
    """
    pixels = open_split(trained.config.data, split)
    if wrong := [row for row in rows if not 0 <= row < len(pixels)]:
        raise UserError(f"--rows={wrong[0]}: the split {split!r} has rows 0 to {len(pixels) - 1}.")
    return Faces(gather_rows(pixels, np.asarray(rows, np.int64)), tuple(f"{split}_{row}" for row in rows))


def row_names(config: DataConfig, split: str, count: int) -> tuple[str, ...]:
    """File names of a split's rows, where it was prepared from files."""
    if config.name == SYNTHETIC:
        return tuple(f"{split}_{row}" for row in range(count))
    return tuple(dataset.read_names(local_dataset(config), split))


def _collect(trained: TrainedVAE, blocks: Any, count: int) -> Encoded:
    mean, log_variance = (np.empty((count, trained.latent_dim), np.float32) for _ in range(2))
    done = 0
    with progress_bar(total=count, description="encoding") as progress:
        for posterior in trained.inference.encode_stream(blocks):
            rows = slice(done, done + len(posterior.mean))
            mean[rows], log_variance[rows] = posterior.mean, posterior.log_variance
            done = rows.stop
            progress.update(len(posterior.mean))
    return Encoded(mean, log_variance)


def _read_kept(path: pathlib.Path, count: int, latent_dim: int) -> Encoded | None:
    """What an earlier call kept; None where there is nothing whole that fits."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            posterior = Encoded(arrays["mean"], arrays["log_variance"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return posterior if all(field.shape == (count, latent_dim) for field in posterior) else None


def _keep(path: pathlib.Path, posterior: Encoded) -> None:
    """Writes what `_read_kept` reads; a folder that cannot be written to costs time only."""
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_writer(path) as file:
            np.savez(file, mean=posterior.mean, log_variance=posterior.log_variance)
    except OSError:
        return


def write_npz(path: pathlib.Path, table: LatentTable) -> None:
    """Arrays `mean`, `log_variance`, `names`, `attributes` [n, a] and `attribute_names`, read without pickle."""
    with atomic_writer(path) as file:
        np.savez(
            file,
            mean=table.mean,
            log_variance=table.log_variance,
            names=np.array(table.names, dtype=np.str_),
            attributes=table.labels.values.astype(np.float32),
            attribute_names=np.array([attribute.name for attribute in table.labels.attributes], dtype=np.str_),
        )


def write_parquet(path: pathlib.Path, table: LatentTable) -> None:
    """One row a face: `name`, `mean` and `log_variance` as lists, and a column for each attribute.

    Raises:
      UserError: pyarrow is not installed; a label has the name of another column.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError('Parquet files need pyarrow: pip install "facevae-jax[parquet]", or take .npz.') from error
    size = table.mean.shape[1]
    names = [name.encode(errors="replace").decode() for name in table.names]  # a file's name may be no UTF-8
    columns = {"name": arrow.array(names)}
    for name, values in (("mean", table.mean), ("log_variance", table.log_variance)):
        columns[name] = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), size)
    if taken := {attribute.name for attribute in table.labels.attributes} & columns.keys():
        raise UserError(f"--output={path.name}: the label {taken.pop()!r} has the name of another column: take .npz.")
    for number, attribute in enumerate(table.labels.attributes):
        columns[attribute.name] = arrow.array(table.labels.values[:, number], from_pandas=True)  # NaN becomes null
    described = {attribute.name: _describe(attribute) for attribute in table.labels.attributes}
    content = arrow.table(columns).replace_schema_metadata({"attributes": json.dumps(described)})
    with atomic_writer(path) as file:
        parquet.write_table(content, file)


def _describe(attribute: Attribute) -> dict[str, Any]:
    return {"kind": attribute.kind, "categories": list(attribute.categories)}
