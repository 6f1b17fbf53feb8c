"""Prepared datasets in buckets (gs://, s3://, whatever `etils.epath` opens), copied to the local disk once per host.

A file gets its name in the cache when it is complete and has the checksum that the dataset's own list gives, so an
interrupted fetch resumes where it stopped.
"""

import contextlib
import json
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError, make_writable_directory
from facevae_jax.core.files import AnyPath, file_sha256, locked, replacing
from facevae_jax.core.parallel import map_in_order
from facevae_jax.core.progress import progress_bar
from facevae_jax.data.prepared import reading
from facevae_jax.data.prepared.locations import is_remote, unreachable
from facevae_jax.data.prepared.records import INFO_FILE

THREADS = 8  # that fetch; they wait for the network, not for the processor
TRAINED = ("train", "validation")  # splits that a run reads


class RecordFile(NamedTuple):
    """One ArrayRecord file of a dataset."""

    remote: AnyPath
    local: AnyPath
    size: int
    sha256: str | None  # None: written by a version without checksums

    @property
    def is_there(self) -> bool:
        """Whether it was fetched before."""
        return self.local.exists() and (self.sha256 is None or self.local.stat().st_size == self.size)


def local_dataset(config: DataConfig, splits: Sequence[str] = TRAINED) -> AnyPath:
    """The directory of the configured dataset on this machine. From a bucket, missing files of `splits` are fetched.

    Raises UserError: the dataset is not prepared, cannot be reached, or there is no room for it.
    """
    if not is_remote(config.data_dir):
        return reading.find_dataset(config.data_dir, name=config.name, resolution=config.resolution)
    with _explained(config):
        remote = reading.find_dataset(config.data_dir, name=config.name, resolution=config.resolution)
        files = {path.name: path for path in remote.iterdir()}
        small = {
            name: path.read_bytes() for name, path in files.items() if ".array_record-" not in name and "." in name
        }
    home = make_writable_directory(config.cache_dir, name="config.data.cache_dir")
    parent = home / urllib.parse.quote(config.data_dir, safe="") / config.name / str(config.resolution)
    make_writable_directory(parent, name="config.data.cache_dir")
    directory = parent / remote.name
    with locked(parent / f"{remote.name}.lock", wait=True):  # one process of a host fetches, the others wait
        if not _agrees(directory, small):  # the dataset was replaced: its files and pixel stores are of no use
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        missing = [file for file in _record_files(config, remote, directory, small, splits) if not file.is_there]
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
            for file in map_in_order(_fetch, missing, threads=THREADS):
                progress.update(file.size)
        for name in sorted(small, key=lambda name: name == INFO_FILE):  # which makes a folder a dataset, comes last
            with replacing(directory / name) as temporary:
                temporary.write_bytes(small[name])
    return directory


@contextlib.contextmanager
def _explained(config: DataConfig) -> Iterator[None]:
    """Turns whatever an object store's library raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise unreachable(error, config.data_dir, name="config.data.data_dir") from error


def _agrees(directory: AnyPath, small: Mapping[str, bytes]) -> bool:
    """Whether what was fetched before belongs to the dataset that is in the bucket now."""
    return all(
        not (directory / name).exists() or (directory / name).read_bytes() == small.get(name)
        for name in (INFO_FILE, reading.CHECKSUMS)
    )


def _record_files(
    config: DataConfig, remote: AnyPath, directory: AnyPath, small: Mapping[str, bytes], splits: Sequence[str]
) -> Iterator[RecordFile]:
    """The record files of some splits."""
    try:
        lengths = {split["name"]: len(split["shardLengths"]) for split in json.loads(small[INFO_FILE])["splits"]}
        checksums = json.loads(small.get(reading.CHECKSUMS, b"{}"))
        for split in (split for split in splits if split in lengths):
            for number in range(lengths[split]):
                file = f"{config.name}-{split}.array_record-{number:05d}-of-{lengths[split]:05d}"
                known = checksums.get(file, {})
                yield RecordFile(remote / file, directory / file, known.get("bytes", 0), known.get("sha256"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.data.data_dir={config.data_dir!r}: {config.name!r} is damaged: copy it again."
        ) from error


def _fetch(file: RecordFile) -> RecordFile:
    """Copies one file and verifies its checksum."""
    with replacing(file.local) as temporary:
        with file.remote.open("rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 2**22)
        if file.sha256 not in (None, file_sha256(temporary)):
            raise UserError(f"{file.remote} is damaged (see {reading.CHECKSUMS}): copy it there again.")
    return file
