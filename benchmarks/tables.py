"""A suite's record as rows of text, for the screen and for docs/throughput.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

HIDDEN = ("what", "config", "notes", "skipped", "peers", "devices")  # are told elsewhere, or in the JSON alone
RAW = "_all"  # ending of the keys that hold every timing
SERIES = "images_per_second"  # of the points {"x", "images_per_second"} of a growth series
OURS = "ours"


class Table(NamedTuple):
    """Cells of text; numbers stand in all columns but the first."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def table(name: str, record: Mapping[str, Any]) -> Table:
    """The figures of a suite's record."""
    match name:
        case "peers":
            return peers_table(record)
        case "growth":
            return growth_table(record)
    return Table((name, "value"), [(label, number(value)) for label, value in figures(record)])


def peers_table(record: Mapping[str, Any]) -> Table:
    """Training speed of every peer, the fastest first."""
    median = record["median"]
    ours = median.get(OURS)
    rows = [
        (name, number(rate), f"{ours / rate:.2f}" if ours else "")
        for name, rate in sorted(median.items(), key=lambda item: (-item[1], item[0]))
    ]
    rows += [(name, "-", "-") for name in sorted(record.get("skipped", {}))]
    return Table(("trainer", "images/s", "ours is so many times as fast"), rows)


def growth_table(record: Mapping[str, Any]) -> Table:
    """Every point of every series."""
    rows = []
    for name, points in growth_series(record).items():
        rows += [(name.replace("_", " "), f"{point['x']:,}", number(point[SERIES])) for point in points]
    return Table(("growing", "to", "images/s"), rows)


def growth_series(record: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The series of the suite `growth` that have points."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and SERIES in value[0]
    }


def figures(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(label, number or None) of all that is no raw timing, in the record's order."""
    for key, value in record.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        if key in HIDDEN or key.endswith(RAW):
            continue
        if isinstance(value, Mapping):
            yield from figures(value, f"{label}: ")
        elif value is None or isinstance(value, (int, float)):
            yield label, value


def number(value: float | None) -> str:
    """Three significant digits or all digits before the point, whichever is more; `-` where there is no number."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def text(table: Table) -> str:
    """For the screen."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    lines = (
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """For a document."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = ["---", *["---:"] * (len(table.header) - 1)]
    return "\n".join(line(row) for row in (table.header, rule, *table.rows))
