"""Prepared datasets in buckets (gs://, s3://, whatever `etils.epath` opens), cached on the local disk once per host.

A file gets its name in the cache when it is whole and has the checksum that the dataset's own list gives, so a fetch
that is stopped is gone on with.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from facevae_jax.config import DataConfig
from facevae_jax.data import dataset
from facevae_jax.data.locations import is_remote
from facevae_jax.data.parallel import map_in_order
from facevae_jax.data.records import INFO_FILE, reason, shards_of
from facevae_jax.errors import UserError, make_writable_directory
from facevae_jax.files import atomic_writer, locked
from facevae_jax.progress import progress_bar

THREADS = 8  # that fetch; they wait for the network, not for the processor
COPY_BYTES = 2**22
TRAINED = ("train", "validation")  # splits that a run reads
ATTEMPTS = 2
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


class RecordFile(NamedTuple):
    """One ArrayRecord file of a dataset."""

    name: str
    size: int
    sha256: str | None  # None: written by a version that kept no checksums


def local_dataset(config: DataConfig) -> pathlib.Path:
    """The directory of the configured dataset on this machine, fetched first where it is in a bucket.

    Raises:
      UserError: the dataset is not prepared, cannot be reached, or there is no room for it.
    """
    if not is_remote(config.data_dir):
        return dataset.find_dataset(config.data_dir, name=config.name, resolution=config.resolution)
    return fetch_dataset(config)


def fetch_dataset(config: DataConfig, rows: Mapping[str, range] | None = None) -> pathlib.Path:
    """Copies a dataset from its bucket, as far as it is not there yet, and returns the copy's directory.

    Args:
      config: name, resolution, data_dir (the bucket) and cache_dir.
      rows: of each split, those that are needed: only the files that hold them are fetched. None: all that a run reads.

    Raises:
      UserError: as `local_dataset`.
    """
    with _explained(config):
        remote = _find(config)
        small = {path.name: path.read_bytes() for path in _small_files(remote)}
    version = remote.name
    home = make_writable_directory(config.cache_dir, name="config.data.cache_dir")
    parent = home / urllib.parse.quote(config.data_dir, safe="") / config.name / str(config.resolution)
    make_writable_directory(parent, name="config.data.cache_dir")
    directory = parent / version
    with locked(parent / f"{version}.lock", wait=True):  # one process of this host fetches, the others find it done
        if not _agrees(directory, small):
            # Another dataset has taken its place: neither its files nor pixel stores made of them are of use.
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        for name in small.keys() - {INFO_FILE}:  # which makes a folder a dataset, and is written last
            _write(directory / name, small[name])
        missing = [file for file in _needed(config, small, rows) if not _is_there(directory / file.name, file)]
        free, needed = shutil.disk_usage(directory).free, sum(file.size for file in missing)
        if needed > free:
            raise UserError(
                f"config.data.cache_dir={config.cache_dir!r}: {config.data_dir} takes {needed / 1e9:,.1f} GB more, "
                f"{free / 1e9:,.1f} GB are free: choose another --config.data.cache_dir."
            )
        with (
            _explained(config),
            progress_bar(total=needed, description=f"fetching {config.name}", unit="B", scale=True) as progress,
        ):
            fetched = map_in_order(
                lambda file: _fetch(remote / file.name, directory / file.name, file), missing, threads=THREADS
            )
            for file in fetched:
                progress.update(file.size)
            _write(directory / INFO_FILE, small[INFO_FILE])
    return directory


@contextlib.contextmanager
def _explained(config: DataConfig) -> Iterator[None]:
    """Turns what the libraries of buckets raise, which is anything, into one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        scheme = config.data_dir.partition("://")[0]
        raise UserError(
            f"config.data.data_dir={config.data_dir!r} needs a package: pip install {PACKAGES.get(scheme, 'fsspec')}."
        ) from error
    except Exception as error:
        raise UserError(
            f"config.data.data_dir={config.data_dir!r} cannot be read ({reason(error)}): check the address, the "
            f"network and your credentials, and that config.data.cache_dir={config.cache_dir!r} can be written to."
        ) from error


def _find(config: DataConfig) -> Any:
    """The epath directory of the newest version of the dataset."""
    from etils import epath

    try:
        root = epath.Path(config.data_dir)
    except KeyError as error:
        known = ", ".join(f"{scheme}://" for scheme in PACKAGES)
        raise UserError(f"config.data.data_dir={config.data_dir!r}: use a local folder or one of {known}.") from error
    folder = root / config.name / str(config.resolution)
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            numbers = path.name.split(".")
            if len(numbers) == 3 and all(number.isdecimal() for number in numbers) and (path / INFO_FILE).exists():
                found[tuple(map(int, numbers))] = path
    if found:
        return found[max(found)]
    there = sorted(path.name for path in (root / config.name).iterdir()) if (root / config.name).is_dir() else []
    also = f"; {config.name!r} is there at {', '.join(there)}" if there else ""
    raise UserError(
        f"config.data.name={config.name!r} (config.data.resolution={config.resolution}) is not prepared in "
        f"config.data.data_dir={config.data_dir!r}{also}: prepare it, and copy its folder there."
    )


def _small_files(remote: Any) -> list[Any]:
    """The description of a dataset: every file but the records."""
    return [path for path in remote.iterdir() if ".array_record-" not in path.name and "." in path.name]


def _agrees(directory: pathlib.Path, small: Mapping[str, bytes]) -> bool:
    """Whether what was fetched before is of the dataset that is in the bucket now."""
    return all(
        not (directory / name).exists() or (directory / name).read_bytes() == small.get(name)
        for name in (INFO_FILE, dataset.CHECKSUMS)
    )


def _needed(config: DataConfig, small: Mapping[str, bytes], rows: Mapping[str, range] | None) -> Iterator[RecordFile]:
    """The record files of the rows."""
    try:
        splits = {split["name"]: split for split in json.loads(small[INFO_FILE])["splits"]}
        checksums = json.loads(small.get(dataset.CHECKSUMS, b"{}"))
        wanted = {name: None for name in TRAINED if name in splits} if rows is None else dict(rows)
        for name, part in wanted.items():
            lengths = [int(length) for length in splits[name]["shardLengths"]]
            for number in shards_of(lengths, part):
                file = f"{config.name}-{name}.array_record-{number:05d}-of-{len(lengths):05d}"
                known = checksums.get(file, {})
                yield RecordFile(file, known.get("bytes", 0), known.get("sha256"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.data.data_dir={config.data_dir!r}: the description of {config.name!r} is damaged: copy the "
            "dataset there anew."
        ) from error


def _is_there(path: pathlib.Path, file: RecordFile) -> bool:
    return path.exists() and (file.sha256 is None or path.stat().st_size == file.size)


def _fetch(remote: Any, local: pathlib.Path, file: RecordFile) -> RecordFile:
    """Copies one file and compares its checksum; tries again once."""
    for _ in range(ATTEMPTS):
        digest = hashlib.sha256()
        with contextlib.suppress(_Damaged), remote.open("rb") as source, atomic_writer(local) as target:
            while block := source.read(COPY_BYTES):
                digest.update(block)
                target.write(block)
            if file.sha256 not in (None, digest.hexdigest()):
                raise _Damaged
            return file
    raise UserError(
        f"{remote} is damaged: it does not have the checksum in {dataset.CHECKSUMS}; copy that file there anew."
    )


class _Damaged(Exception):
    """The bytes that came are not those that were written."""


def _write(path: pathlib.Path, content: bytes) -> None:
    with atomic_writer(path) as file:
        file.write(content)
