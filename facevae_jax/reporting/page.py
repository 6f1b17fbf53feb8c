"""What a page is made of, and the page as HTML: one file without scripts that refers to no other."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax import pictures
from facevae_jax.errors import UserError

TEMPLATE = "report.html.jinja"
MAX_SIDE = 128  # pixels of a face on the page: a sheet of larger ones would make the file too large to send
SHOWN_SIDE = 96  # CSS pixels of a face where there is room


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that is part of the page's file."""

    kind: ClassVar[str] = "picture"
    uri: str  # data:image/...
    size: tuple[int, int]  # CSS pixels, width and height, where there is room
    alt: str
    caption: str = ""
    scale: Sequence[str] = ()  # what stands below each column
    beside: bool = False  # next to others like it where there is room, as charts are; else below them


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of each names it."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = False  # which are not broken over two lines
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Note:
    """A line of text."""

    kind: ClassVar[str] = "note"
    beside: ClassVar[bool] = False
    text: str


Block = Picture | Table | Note


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under its own heading."""

    anchor: str
    title: str
    explanation: str  # what one sees, in a sentence or two
    blocks: Sequence[Block]

    @property
    def groups(self) -> list[list[Block]]:
        """The blocks in order; those that stand beside each other are together."""
        groups: list[list[Block]] = []
        for block in self.blocks:
            if block.beside and groups and groups[-1][-1].beside and groups[-1][-1].kind == block.kind:
                groups[-1].append(block)
            else:
                groups.append([block])
        return groups


def section(anchor: str, title: str, explanation: str, build: Callable[[], Sequence[Block]]) -> Section:
    """A section; where what it needs is not there, the reason stands in its place."""
    return Section(anchor, title, explanation, or_note(build))


def or_note(build: Callable[[], Sequence[Block]]) -> Sequence[Block]:
    """The blocks that `build` makes, or why there are none."""
    try:
        return build()
    except UserError as error:
        return [Note(f"Left out: {error}")]


def sheet(
    images: UInt8[np.ndarray, "rows columns r r 3"], *, alt: str, caption: str = "", scale: Sequence[str] = ()
) -> Picture:
    """Faces in rows, each reduced to `MAX_SIDE` pixels where it is larger.

    Args:
      images: the faces.
      alt: what is there for who does not see it.
      caption: a line below.
      scale: what stands below each column.
    """
    columns = images.shape[1]
    faces = images.reshape(-1, *images.shape[2:])
    if images.shape[2] > MAX_SIDE:
        faces = np.stack([_reduced(face) for face in faces])
    grid = pictures.grid(faces, columns=columns)
    width = columns * SHOWN_SIDE
    return Picture(png_uri(grid), (width, round(width * grid.shape[0] / grid.shape[1])), alt, caption, scale)


def _reduced(face: UInt8[np.ndarray, "r r 3"]) -> UInt8[np.ndarray, "s s 3"]:
    return np.asarray(Image.fromarray(face).resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS))


def png_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The image as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def data_uri(media_type: str, data: bytes) -> str:
    """The bytes as a URI of their own."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def render(**content: Any) -> bytes:
    """The page, in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html: str = environment.get_template(TEMPLATE).render(**content)
    return html.encode("utf-8", "replace")  # file names may hold bytes that are no UTF-8
