"""Configs by name: `--config=ffhq128` works in every directory, beside the path of any file."""

import difflib
import os
import pathlib
import runpy
from typing import Any

from facevae_jax.core.errors import UserError, expand_home

PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """The project's configs: inside the installed package, or beside the package in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of the project's configs."""
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def find(given: str) -> str:
    """The path of the config file that `--config=given` means.

    A name such as `ffhq128` means the project's config; `configs/ffhq128.py` means the same where no such file exists
    in the current directory. Anything else is the path of a file, in which `~` is expanded.

    Raises:
      UserError: there is no such file and no such name.
    """
    known = names()
    file, colon, argument = given.partition(":")  # ml_collections passes the argument to get_config()
    path = expand_home(file, name="--config")
    by_name = path.parent in (pathlib.Path(), pathlib.Path("configs")) and path.suffix in ("", ".py")
    if file not in known and os.path.isfile(path):  # noqa: PTH113 - no error where its folder may not be read
        found = path
    elif by_name and path.stem in known:
        found = folder() / f"{path.stem}.py"
    else:
        near = difflib.get_close_matches(path.stem, known, cutoff=0.5) or known
        raise UserError(f"--config={given!r} is neither a file nor the name of a config: try {', '.join(near)}.")
    return f"{found}{colon}{argument}"


def with_paths(argv: list[str]) -> list[str]:
    """The command line with the value of `--config`, in either spelling, replaced by the path of the file.

    Raises:
      UserError: as `find`.
    """
    argv = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            argv[i] = f"{flag}={find(value)}"
        elif i + 1 < len(argv):
            argv[i + 1] = find(argv[i + 1])
    return argv


def read(name: str) -> Any:
    """The ConfigDict of one of the project's configs."""
    return runpy.run_path(str(folder() / f"{name}.py"))["get_config"]()


def flag(name: str) -> str | None:
    """What to type for the config `name` in the current directory, such as `--config=ffhq128`; None without one."""
    file = pathlib.Path("configs", f"{name}.py")
    if file.is_file():
        return f"--config={file}"
    return f"--config={name}" if name in names() else None
