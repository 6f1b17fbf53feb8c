"""Progress of long loops: a bar on a terminal, a line every half minute in a log file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """Writes tqdm's output to standard error as whole lines, without the carriage returns that redraw a bar."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*, total: int, description: str | None = None, unit: str = "image", scale: bool = False) -> tqdm:
    """A tqdm bar on standard error; if that is not a terminal, a line every half minute, and none for short loops.

    Args:
      total: number of units.
      description: what the loop does.
      unit: the name of a unit.
      scale: print 12.3M for 12,300,000.
    """
    common: dict[str, Any] = {"total": total, "desc": description, "unit": unit, "unit_scale": scale}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True)
    seconds = SECONDS_BETWEEN_LINES
    # miniters=1: by default tqdm checks the clock less and less often.
    return tqdm(**common, file=_Lines(), delay=seconds, mininterval=seconds, miniters=1, leave=False, ncols=110)
