"""How far a long pass is: a bar on a terminal, now and then a line in a log file."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """A file for tqdm that gets whole lines instead of a bar which is drawn over and over."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(*, total: int, description: str | None = None, unit: str = "image", scale: bool = False) -> tqdm:
    """A tqdm bar on standard error; where that is no terminal, a line every half minute, and none of short passes.

    Args:
      total: units in all.
      description: what is done.
      unit: of `total`.
      scale: write 12.3M for 12,300,000.
    """
    common: dict[str, Any] = {"total": total, "desc": description, "unit": unit, "unit_scale": scale}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True)
    seconds = SECONDS_BETWEEN_LINES
    lines = _Lines(sys.stderr)
    # miniters: otherwise tqdm would look at the clock less and less often.
    return tqdm(**common, file=lines, delay=seconds, mininterval=seconds, miniters=1, leave=False, ncols=110)
