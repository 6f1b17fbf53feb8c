"""Prepared datasets in buckets (gs://, s3://, whatever `etils.epath` opens), copied to the local disk once per host.

A file gets its name in the cache when it is complete and has the checksum that the dataset's own list gives, so an
interrupted fetch resumes where it stopped.
"""

import functools
import json
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError, make_writable_directory
from facevae_jax.core.files import AnyPath, file_sha256, locked, replacing
from facevae_jax.core.parallel import map_in_order
from facevae_jax.core.progress import progress_bar
from facevae_jax.data.prepared import reading
from facevae_jax.data.prepared.locations import is_remote, reaching

THREADS = 8  # that fetch; they wait for the network, not for the processor
TRAINED = ("train", "validation")  # splits that a run reads


def local_dataset(config: DataConfig, splits: Sequence[str] = TRAINED) -> AnyPath:
    """The directory of the configured dataset on this machine. From a bucket, missing files of `splits` are fetched.

    Raises UserError: the dataset is not prepared, cannot be reached, or there is no room for it.
    """
    if not is_remote(config.data_dir):
        return reading.find_dataset(config.data_dir, name=config.name, resolution=config.resolution)
    with reaching(config.data_dir, name="config.data.data_dir"):
        remote = reading.find_dataset(config.data_dir, name=config.name, resolution=config.resolution)
        found = [path for path in remote.iterdir() if ".array_record-" not in path.name and "." in path.name]
        small = {path.name: path.read_bytes() for path in found}
    files = _record_files(config, small, splits)
    home = make_writable_directory(config.cache_dir, name="config.data.cache_dir")
    parent = home / urllib.parse.quote(config.data_dir, safe="") / config.name / str(config.resolution)
    make_writable_directory(parent, name="config.data.cache_dir")
    directory = parent / remote.name
    with locked(parent / f"{remote.name}.lock", wait=True):  # one process of a host fetches, the others wait
        if not _agrees(directory, small):  # the dataset was replaced: its files and pixel stores are of no use
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        held = {path.name: path.stat().st_size for path in directory.iterdir()}
        missing = [
            name for name, known in files.items() if name not in held or held[name] != known.get("bytes", held[name])
        ]
        free, needed = shutil.disk_usage(directory).free, sum(files[name].get("bytes", 0) for name in missing)
        if needed > free:
            raise UserError(
                f"config.data.cache_dir={config.cache_dir!r}: {config.data_dir} takes {needed / 1e9:,.1f} GB more, "
                f"{free / 1e9:,.1f} GB are free: choose another --config.data.cache_dir."
            )
        with (
            reaching(config.data_dir, name="config.data.data_dir"),
            progress_bar(total=needed, description=f"fetching {config.name}", unit="B", scale=True) as progress,
        ):
            fetch = functools.partial(_fetch, remote, directory, files)
            for name in map_in_order(fetch, missing, threads=THREADS):
                progress.update(files[name].get("bytes", 0))
        # The description, which makes a folder a dataset, comes last.
        for name in sorted(small, key=lambda name: name == reading.INFO_FILE):
            with replacing(directory / name) as temporary:
                temporary.write_bytes(small[name])
    return directory


def _agrees(directory: AnyPath, small: Mapping[str, bytes]) -> bool:
    """Whether what was fetched before belongs to the dataset that is in the bucket now."""
    return all(
        not (directory / name).exists() or (directory / name).read_bytes() == small.get(name)
        for name in (reading.INFO_FILE, reading.CHECKSUMS)
    )


def _record_files(config: DataConfig, small: Mapping[str, bytes], splits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The record files of some splits, with their bytes and SHA-256; without, if an older version made the dataset."""
    try:
        lengths = {
            split["name"]: len(split["shardLengths"]) for split in json.loads(small[reading.INFO_FILE])["splits"]
        }
        known = json.loads(small.get(reading.CHECKSUMS, b"{}"))
        numbers = [(split, number) for split in splits for number in range(lengths.get(split, 0))]
        files = [f"{config.name}-{s}.array_record-{number:05d}-of-{lengths[s]:05d}" for s, number in numbers]
        return {file: known.get(file, {}) for file in files}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"config.data.data_dir={config.data_dir!r}: {config.name!r} is damaged: copy it again."
        ) from error


def _fetch(remote: AnyPath, directory: AnyPath, files: Mapping[str, dict[str, Any]], name: str) -> str:
    """Copies one file and verifies its checksum."""
    with replacing(directory / name) as temporary:
        with (remote / name).open("rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 2**22)
        if files[name].get("sha256") not in (None, file_sha256(temporary)):
            raise UserError(f"{remote / name} is damaged (see {reading.CHECKSUMS}): copy it there again.")
    return name
