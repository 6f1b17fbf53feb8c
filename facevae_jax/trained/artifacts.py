"""What is fitted to a trained model, kept in the run's folder: moments, priors, directions, curves, encoded splits.

An artifact belongs to one model and to the content of its data: a dataset that was prepared anew under its old name
never meets what was fitted to the old one. On a machine without the data, the newest artifact of the model is taken.
"""

import contextlib
import hashlib
import json
import pathlib
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import atomic_writer

DIRECTORY = "artifacts"
FORMAT = 1  # of the files; raised where their numbers come to mean something else
FACTS = "facts"
MAX_NAME = 100  # characters of a file's name; a longer one ends in a hash


class Artifact(NamedTuple):
    """Plain arrays, and facts as JSON has them: reading needs no pickle."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


class ArtifactStore:
    """The artifacts of one model; a folder that cannot be written to costs time only."""

    def __init__(self, folder: pathlib.Path, *, model: Callable[[], str], data: Callable[[], str]) -> None:
        """Nothing is read or made yet.

        Args:
          folder: of the run, or of an exported model.
          model: gives a name for the parameters.
          data: gives the fingerprint of the data's content, or raises a UserError where they are not on this machine.
        """
        self._folder, self._model, self._data = folder / DIRECTORY, model, data

    def get(self, name: str) -> Artifact | None:
        """What was kept under this name; None where there is nothing whole of this format."""
        for path in self._candidates(name):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
                with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
                    arrays = dict(loaded)
                facts = json.loads(str(arrays.pop(FACTS)))
                if (facts.pop("format"), facts.pop("name")) == (FORMAT, name):
                    return Artifact(arrays, facts)
        return None

    def put(self, name: str, arrays: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        """Keeps arrays and facts."""
        described = json.dumps({**(facts or {}), "format": FORMAT, "name": name})
        with contextlib.suppress(OSError, UserError):
            path = self._path(name, short_hash(self._data()))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_writer(path) as file:
                np.savez(file, **{FACTS: np.array(described)} | dict(arrays))

    def copy(self, name: str, folder: pathlib.Path) -> None:
        """Copies what was kept under this name, if anything, into another folder of the same model."""
        for path in self._candidates(name)[:1]:
            if path.exists():
                copied = folder / DIRECTORY / path.relative_to(self._folder)
                copied.parent.mkdir(parents=True, exist_ok=True)
                with atomic_writer(copied) as file:
                    file.write(path.read_bytes())

    def drop(self, name: str) -> None:
        """Removes what was kept under this name."""
        for path in self._candidates(name):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, name: str, data: str) -> pathlib.Path:
        stem = urllib.parse.quote(name, safe="")
        stem = stem if len(stem) <= MAX_NAME else f"{stem[:60]}-{short_hash(name)}"
        return self._folder / self._model() / f"{stem}-{data}.npz"

    def _candidates(self, name: str) -> list[pathlib.Path]:
        try:
            return [self._path(name, short_hash(self._data()))]
        except UserError:
            pattern = self._path(name, "*")
            found = pattern.parent.glob(pattern.name) if pattern.parent.is_dir() else []
            return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def short_hash(text: str) -> str:
    """The first digits of a SHA-256, for the names of files."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
