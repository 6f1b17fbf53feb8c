"""`export.json`: what an exported folder holds, with checksums."""

import hashlib
import json
import pathlib
from typing import Any

from facevae_jax.core.errors import UserError

FILE = "export.json"


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_contents(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `export.json`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        contents = json.loads(path.read_bytes())
        contents["files"].items()
        return contents
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{str(folder)!r} is not an exported model: it has no {FILE}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): export the model again.") from error


def check_file(folder: pathlib.Path, name: str) -> bytes:
    """The content of a file of an exported folder.

    Raises:
      UserError: it is missing, or its checksum is wrong.
    """
    path = folder / name
    recorded = read_contents(folder)["files"].get(name)
    if recorded is None:
        raise UserError(f"{str(folder)!r} was exported without {name}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): export the model again.") from error
    if sha256(content) != recorded.get("sha256"):
        raise UserError(f"{path} is damaged: its checksum differs from {FILE}; export or copy it again.")
    return content
