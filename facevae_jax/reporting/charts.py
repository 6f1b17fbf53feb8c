"""How charts look: sized so that their text can be read on a phone, and as SVG, which prints sharp."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import NullFormatter

from facevae_jax.reporting.page import Picture, data_uri
from facevae_jax.reporting.runs import printable, shortened

WIDTH, HEIGHT = 4.0, 2.8  # inches; 4.0 are 384 CSS pixels, about what a phone is wide
LEGEND_LINE = 0.2  # inches
LEGEND_COLUMNS = ((4, 6), (3, 10), (2, 18), (1, 1000))  # and the longest name that each leaves room for
CSS_PIXELS = 96  # of an inch
# Okabe & Ito 2008: told apart by those who do not see all colours, and in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d3a9b", "#555555")
INK, FAINT = "#1a1a1a", "#767676"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.figsize": (WIDTH, HEIGHT),
    "font.size": 9,
    "grid.color": "#e3e3e3",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "path.simplify_threshold": 0.5,
    "savefig.dpi": 200,  # of what is drawn as pixels, such as thousands of points
    "svg.fonttype": "path",  # whoever reads it need not have the font
    "svg.hashsalt": "facevae_jax",  # the same bytes for the same figures
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draws in this style; a name in a script that the font lacks becomes boxes, without a warning for each."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def picture(figure: Figure, *, alt: str, caption: str = "") -> Picture:
    """A figure as a part of the page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches()
    size = (round(width * CSS_PIXELS), round(height * CSS_PIXELS))
    return Picture(data_uri("image/svg+xml", file.getvalue()), size, alt, caption, beside=True)


def label(name: str) -> str:
    """A name as text in a chart."""
    text = shortened(printable(name))
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves underscored names out of legends


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend under a chart, made higher by so much: it hides nothing, however many and long the names are."""
    longest = max(map(len, labels))
    columns = min(len(labels), next(n for n, most in LEGEND_COLUMNS if longest <= most))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own writes powers as formulas, which are not parsed here
    axes.yaxis.set_minor_formatter(NullFormatter())
