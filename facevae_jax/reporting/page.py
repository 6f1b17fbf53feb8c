"""The page's building blocks, in HTML and in matplotlib: one file without scripts that refers to no other file."""

import base64
import contextlib
import io
import itertools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import NullFormatter
from PIL import Image

from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError
from facevae_jax.reporting.runs import printable, shortened

TEMPLATE = "report.html.jinja"
MAX_SIDE = 128  # pixels of a face on the page; larger ones would make the file too large to send
SHOWN_SIDE = 96  # CSS pixels of a face where there is room

# Charts are sized so that their text can be read on a phone.
WIDTH, HEIGHT = 4.0, 2.8  # inches; 4.0 are 384 CSS pixels, about the width of a phone
LEGEND_LINE = 0.2  # inches
LEGEND_COLUMNS = ((4, 6), (3, 10), (2, 18), (1, 1000))  # columns, and the longest name that fits into one
CSS_PIXELS = 96  # of an inch
# Okabe & Ito 2008: distinct for color-blind readers, and in gray.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d3a9b", "#555555")
INK, FAINT = "#1a1a1a", "#767676"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLORS),
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
    "savefig.dpi": 200,  # of rasterized parts, such as thousands of points
    "svg.fonttype": "path",  # the reader may not have the font
    "svg.hashsalt": "facevae_jax",  # equal charts are equal bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


class Picture(NamedTuple):
    """An image inside the page's file."""

    uri: str  # data:image/...
    size: tuple[int, int]  # CSS pixels, width and height, where there is room
    alt: str
    caption: str = ""
    scale: Sequence[str] = ()  # a label below each column
    beside: bool = False  # next to other charts where there is room


class Table(NamedTuple):
    """Rows of text; the first cell of each row is its header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = False  # cells are not broken over two lines
    beside: bool = False


class Note(NamedTuple):
    """A line of text."""

    text: str
    beside: bool = False


Block = Picture | Table | Note


def or_note(build: Callable[[], Sequence[Block]]) -> Sequence[Block]:
    """The blocks that `build` makes, or a note with the reason why there are none."""
    try:
        return build()
    except UserError as error:
        return [Note(f"Left out: {error}")]


def sheet(
    images: UInt8[np.ndarray, "rows columns r r 3"], *, alt: str, caption: str = "", scale: Sequence[str] = ()
) -> Picture:
    """Faces in rows, each reduced to at most `MAX_SIDE` pixels.

    Args:
      images: the faces.
      alt: text for readers who cannot see them.
      caption: a line below.
      scale: a label below each column.
    """
    columns = images.shape[1]
    faces = images.reshape(-1, *images.shape[2:])
    if images.shape[2] > MAX_SIDE:
        small = (Image.fromarray(face).resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS) for face in faces)
        faces = np.stack([np.asarray(face) for face in small])
    grid, file = pictures.grid(faces, columns=columns), io.BytesIO()
    Image.fromarray(grid).save(file, format="PNG", optimize=True)
    width = columns * SHOWN_SIDE
    size = (width, round(width * grid.shape[0] / grid.shape[1]))
    return Picture(data_uri("image/png", file.getvalue()), size, alt, caption, scale)


def data_uri(media_type: str, data: bytes) -> str:
    """The bytes as a URI that contains them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Applies the charts' style; characters that the font lacks become boxes, without a warning for each."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def chart(figure: Figure, *, alt: str, caption: str = "") -> Picture:
    """A figure as SVG, which prints sharp."""
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
    """Adds a legend below a chart, which grows by its height, so that it never covers the chart."""
    labels = [label(text) for text in labels]
    longest = max(map(len, labels))
    columns = min(len(labels), next(n for n, most in LEGEND_COLUMNS if longest <= most))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own writes powers as formulas, which are not parsed here
    axes.yaxis.set_minor_formatter(NullFormatter())


def render(*, sections: Mapping[str, Sequence[Block]], **content: Any) -> bytes:
    """The page, in UTF-8.

    Args:
      sections: blocks by anchor, in the page's order; the template has their titles and explanations.
      **content: the template's other variables.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grouped = {
        anchor: [list(group) for _, group in itertools.groupby(blocks, lambda block: block.beside)]
        for anchor, blocks in sections.items()
    }
    html: str = environment.get_template(TEMPLATE).render(sections=grouped, **content)
    return html.encode("utf-8", "replace")  # file names may hold bytes that are no UTF-8
