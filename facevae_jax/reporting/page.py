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
from matplotlib.colors import LinearSegmentedColormap
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
INK, FAINT, GRID = "#1a1a1a", "#767676", "#e3e3e3"
# What replaces each color where the reader's screen is dark.
DARK = {
    **dict(
        zip(
            COLORS,
            ("#4ba3e3", "#ff8a3d", "#2cc79a", "#e29ac3", "#ffc247", "#9ad6ff", "#b79cf2", "#b4b4b4"),
            strict=True,
        )
    ),
    **{INK: "#e6e6e6", FAINT: "#9a9a9a", GRID: "#3a3d44"},
}
# For points that are drawn as pixels, whose colors cannot be replaced: readable on white and on black.
SCALE = LinearSegmentedColormap.from_list("scale", ["#2c7fb8", "#b06bb8", "#ee7733"])
STYLE: Any = {
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "figure.figsize": (WIDTH, HEIGHT),
    "font.size": 10,
    "grid.color": GRID,
    "legend.fontsize": 9,
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
    row: str = "sheets"  # class of the element that lays it out beside its like; or `charts`


class Table(NamedTuple):
    """Rows of text; the first cell of each row is its header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = False  # cells are not broken over two lines
    row: str = ""  # `tables`: beside others


class Note(NamedTuple):
    """A line of text."""

    text: str
    row: str = ""


class Bar(NamedTuple):
    """A figure from 0 to 1 with its name."""

    name: str
    value: float
    weak: bool  # too small to be of use


class Bars(NamedTuple):
    """Figures as a list of bars."""

    bars: Sequence[Bar]
    row: str = ""


Block = Picture | Table | Note | Bars


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
    gaps = pictures.grid(np.zeros((*faces.shape[:3], 1), np.uint8), columns=columns)  # 255; 0 where a face is
    Image.fromarray(np.concatenate([grid, 255 - gaps], axis=2)).save(file, format="PNG", optimize=True)
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
    """A figure as SVG, which prints sharp, in colors for light and dark screens."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches()
    size = (round(width * CSS_PIXELS), round(height * CSS_PIXELS))
    return Picture(data_uri("image/svg+xml", themed(file.getvalue()).encode()), size, alt, caption, row="charts")


def themed(svg: str) -> str:
    """The chart with its colors as CSS variables that are others on a dark screen; paper is never dark."""
    light, dark = [], []
    for number, (color, on_dark) in enumerate(DARK.items()):
        svg = svg.replace(f": {color}", f": var(--c{number})")
        light.append(f"--c{number}:{color}")
        dark.append(f"--c{number}:{on_dark}")
    style = f":root{{{';'.join(light)}}}@media screen and (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}"
    return svg.replace("<defs>", f"<style>{style}</style><defs>", 1)


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
        anchor: [list(group) for _, group in itertools.groupby(blocks, lambda block: block.row)]
        for anchor, blocks in sections.items()
    }
    html: str = environment.get_template(TEMPLATE).render(sections=grouped, **content)
    return html.encode("utf-8", "replace")  # file names may hold bytes that are no UTF-8
