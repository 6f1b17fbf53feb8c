"""Names of workdirs under which Orbax cannot write, and the recovery of checkpoints that were written under one.

Orbax and tensorstore take some characters of a folder's name for a pattern, a separator or a URL. Under such a name a
save ends without an error, but the arrays of the processes are not joined, or are in another folder.
"""

import pathlib
import re

import tensorstore

from facevae_jax.core.errors import UserError
from facevae_jax.training.checkpoints import DIRECTORY, STATE, steps_in

# A separator of Windows, patterns, the end of a URL's scheme, and bytes that are no text.
UNUSABLE = re.compile(r"[\\*?\[]|:(?=/|$)|[\ud800-\udfff]")
JOINED = "manifest.ocdbt"  # of the arrays of all processes
PARTS = "ocdbt.process_*"  # folders with those of one process


def check_name(workdir: pathlib.Path) -> None:
    """Refuses a workdir under whose name no checkpoint can be written.

    Raises:
      UserError: it is one; where a run is there, its arrays were brought together and it can be renamed.
    """
    path = str(workdir.absolute())
    if not (found := UNUSABLE.search(path)):
        return
    steps = steps_in(workdir)
    for step in steps:
        if not (_state(workdir, step) / JOINED).exists():
            _collect(workdir, step)
    advice = "rename the folder, and the same command with the new name resumes" if steps else "take another name"
    raise UserError(f"--workdir={str(workdir)!r}: checkpoints cannot be kept under {found[0]!r} in a path: {advice}.")


def complete(workdir: pathlib.Path) -> None:
    """Joins the arrays of checkpoints that were written under such a name, before they were renamed.

    Raises:
      UserError: there are some, and the name is still unusable.
    """
    for step in steps_in(workdir):
        state = _state(workdir, step)
        if state.is_dir() and not (state / JOINED).exists() and (parts := sorted(state.glob(PARTS))):
            check_name(workdir)
            _join(state, parts)


def _state(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / DIRECTORY / str(step) / STATE


def _collect(workdir: pathlib.Path, step: int) -> None:
    """Moves the arrays of a step to where the rest of it is: with backslashes they are in folders of other names."""
    elsewhere = pathlib.Path(str((workdir / DIRECTORY).absolute()).replace("\\", "/"))
    elsewhere = elsewhere / f"{step}.orbax-checkpoint-tmp" / f"{STATE}.orbax-checkpoint-tmp"
    for part in [] if elsewhere == _state(workdir, step) else list(elsewhere.glob(PARTS)):
        part.rename(_state(workdir, step) / part.name)


def _join(state: pathlib.Path, parts: list[pathlib.Path]) -> None:
    def opened(folder: pathlib.Path) -> tensorstore.KvStore:
        base = {"driver": "file", "path": f"{folder.absolute()}/"}
        return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()

    whole = opened(state)
    with tensorstore.Transaction(atomic=True) as transaction:
        for part in map(opened, parts):
            for key in part.list().result():
                whole.with_transaction(transaction).write(key, part.read(key).result().value).result()
