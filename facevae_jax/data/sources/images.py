"""From an image file to the PNG bytes of a cropped, resized RGB image; many files at a time, in order."""

import contextlib
import io
import itertools
import pathlib
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from facevae_jax.core.files import reason
from facevae_jax.core.parallel import map_in_order
from facevae_jax.data.sources.names import PNG_START
from facevae_jax.data.sources.opening import File, read_file

FORMATS = ("PNG", "JPEG", "WEBP")  # the only decoders that untrusted files reach
# By name of the filter. The descriptions are in the metadata of prepared datasets.
RESIZES = {
    "lanczos": "Pillow Lanczos, antialiased; "
    "images of four or more times the resolution first reduced to at least twice it",
    "bilinear": "Pillow bilinear, antialiased",  # torchvision's, which published figures for CelebA-64 have
}
REDUCING_GAP = 2.0  # of lanczos; within 50 dB of Lanczos alone, in a sixth of its time for 1024 to 128 pixels
# Run-length and Huffman coding: for filtered faces as small as a search for matches.
# ISA-L takes a third of the time, but in 4 of 60 processes that wrote the same 2,000 faces the bytes of a PNG differed.
PNG_STRATEGY = zlib.Z_RLE
PNG_FILTER_UP = 2
# The chunks that decide a PNG's pixels, and those that say how to show them.
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_SHOWN = (*PNG_PIXELS, b"eXIf", b"iCCP")
# How files begin that have another ending than they should.
OTHER_IMAGES = (
    (re.compile(rb"....ftyp(heic|heix|mif1|msf1|hevc)", re.DOTALL), "a HEIC image: convert it to JPEG"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF image: convert it to JPEG"),
    (re.compile(rb"GIF8"), "a GIF: convert it to PNG"),
    (re.compile(rb"BM"), "a BMP image: convert it to PNG"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF image: convert it to PNG"),
    (re.compile(rb"\s*<"), "a page of a web site, or an SVG: download the image itself"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS: fetch the file itself with git lfs pull"),
)
# By EXIF orientation, as `ImageOps.exif_transpose`.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's, by the color space of a profile
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
MIN_SIDE = 8  # pixels
WHITE = (255, 255, 255, 255)
CHUNK_BYTES = 2**21  # of decoded output per task: enough work for a thread, and little memory
CHUNK_IMAGES = 16  # at most


class Crop(NamedTuple):
    """The part of an image that is kept."""

    description: str
    size: tuple[int, int] | None = None  # (width, height) that every image must have; None: any
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels; None: the centre square


CENTER_SQUARE = Crop("centre square")  # the descriptions are in the metadata of prepared datasets
CELEBA_SIZE = (178, 218)  # width and height of the aligned images
CELEBA_CROP = Crop("centre 148x148 of 178x218: left 15, top 35", size=CELEBA_SIZE, box=(15, 35, 163, 183))


class Task(NamedTuple):
    """How every image of a dataset is converted."""

    crop: Crop
    resolution: int  # pixels along one side
    resize: str = "lanczos"  # a key of `RESIZES`


class Converted(NamedTuple):
    """One image, or why there is none."""

    png: bytes
    enlarged: bool = False  # the crop was smaller than the resolution
    failure: str = ""


def convert(file: File, task: Task) -> Converted:
    """Decodes, turns upright (EXIF), converts to RGB, crops, resizes (see `RESIZES`) and encodes one image."""
    try:
        image, enlarged = load(read_file(file) if isinstance(file, pathlib.Path) else file.read(), task)
        return Converted(encode_png(np.asarray(image)), enlarged=enlarged)
    except Exception as error:  # decoders raise almost anything on damaged files, and the others must be reached
        return Converted(b"", failure=why_unreadable(error))


def load(data: bytes, task: Task) -> tuple[Image.Image, bool]:
    """The RGB image that `task` makes of the bytes of a file, and whether it had to be enlarged.

    Decoders raise almost anything on damaged files; see `why_unreadable`.
    """
    with open_image(data) as image:
        check_size(image)
        fast = task.resize == "lanczos"
        if fast and task.crop.size is None and task.crop.box is None:
            # A JPEG is decoded at a half, a quarter or an eighth of its size if that is large enough.
            image.draft(None, (int(REDUCING_GAP * task.resolution),) * 2)
        image = upright(image)
        cropped = crop_image(to_rgb(image), task.crop)
        size = (task.resolution, task.resolution)
        resample = Image.Resampling[task.resize.upper()]
        resized = cropped.resize(size, resample, reducing_gap=REDUCING_GAP if fast else None)
        return resized, cropped.width < task.resolution


def open_image(data: bytes) -> Image.Image:
    """Opens an image for the rest of `load`; of a PNG whose texts or profile are damaged or huge, without these."""
    try:
        return _opened(data)
    except (OSError, SyntaxError, ValueError) as error:
        if what := next((what for begins, what in OTHER_IMAGES if begins.match(data)), ""):
            raise ValueError(what) from error
        if not data.startswith(PNG_START):
            raise
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            return _opened(_with_chunks(data, PNG_SHOWN))
        return _opened(_with_chunks(data, PNG_PIXELS))


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "PNG":
        image.load()  # chunks after the pixels are read too
    return image


def _with_chunks(data: bytes, kinds: Collection[bytes]) -> bytes:
    """A PNG with some kinds of chunks, those beside the pixels only if they are whole."""
    kept, at = [PNG_START], len(PNG_START)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk, at = data[at : at + 12 + length], at + 12 + length
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if chunk[4:8] in kinds and (whole or chunk[4:8] in PNG_PIXELS):
            kept.append(chunk)
    return b"".join(kept)


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says, in sRGB; metadata that cannot be read count as none."""
    profile, turn = image.info.get("icc_profile"), TURNS.get(_orientation(image))
    turned = image if turn is None else image.transpose(turn)
    return _to_srgb(turned, profile) if profile else turned


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is upright."""
    return image.size[::-1] if _orientation(image) in SIDEWAYS else image.size


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds for damaged EXIF data
        return 1


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image converted from its color profile, such as Display P3; as it is where that is sRGB or damaged."""
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(found).lower()
        if "srgb" in description and not ("linear" in description or "scrgb" in description):
            return image
        mode = PROFILE_MODES[found.profile.xcolor_space.strip()]
        if (mode == "L" and image.mode not in GRAY_MODES) or (mode == "CMYK") != (image.mode == "CMYK"):
            return image  # a profile of other pixels, which a program left there
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if image.mode.startswith("I"):
            image = to_rgb(image)
        plain = image.convert(mode) if mode != image.mode else image
        converted = ImageCms.profileToProfile(plain, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, ValueError):
        return image
    if alpha is not None and converted is not None:
        converted.putalpha(alpha)
    return converted or image


def why_unreadable(error: Exception) -> str:
    """Why `load` failed, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its text has an address in it
        return f"cannot identify a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return reason(error)


def check_size(image: Image.Image) -> None:
    """Raises a ValueError for an opened image that is tiny, or has more pixels than Pillow considers safe."""
    limit = Image.MAX_IMAGE_PIXELS
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels: {MIN_SIDE} is the least along a side")
    if limit is not None and image.width * image.height > limit:  # Pillow alone would warn
        raise ValueError(f"{image.width}x{image.height} pixels are over {limit}: perhaps a decompression bomb")


def encode_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The pixels as a PNG (ISO/IEC 15948) without metadata.

    Pillow tries five filters on each row, which takes 2.7 times as long; its files are 1% larger to 4% smaller.
    """
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = PNG_FILTER_UP  # each byte less the one above it, modulo 256
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, deflate, filters, not interlaced
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, PNG_STRATEGY)
    data = compressor.compress(filtered.data) + compressor.flush()
    return PNG_START + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency over white, 16-bit gray scaled by 1/257.

    Raises ValueError: the pixels have no sensible 8-bit form (floating point, or integers above 65535).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if image.mode.startswith("I"):  # I;16, I;16B and the 32-bit I that holds 16-bit PNG values
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("integer pixels outside 0 to 65535 are not supported")
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_image(image: Image.Image, crop: Crop) -> Image.Image:
    """The part of the image that `crop` keeps.

    Raises ValueError: the image does not have the size that the crop needs.
    """
    if crop.size is not None and image.size != crop.size:
        raise ValueError(f"{image.width}x{image.height} pixels where {crop.size[0]}x{crop.size[1]} are expected")
    if crop.box is not None:
        if image.width < crop.box[2] or image.height < crop.box[3]:
            raise ValueError(
                f"{image.width}x{image.height} pixels end before the crop, at {crop.box[2]}, {crop.box[3]}"
            )
        return image.crop(crop.box)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def stamp(file: File) -> tuple[int, ...]:
    """Numbers that change when the file does; empty if there is no file."""
    try:
        if not isinstance(file, pathlib.Path):
            return file.stamp()
        status = file.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


def ignore_warnings() -> None:
    """Silences Pillow, whose warnings name no file: what matters raises an error here.

    Call it before threads read images: they share one list of filters.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@contextlib.contextmanager
def converting(files: Iterable[File], task: Task, *, threads: int) -> Iterator[Iterator[Converted]]:
    """Yields the results of converting `files` with `threads` threads, in the order of `files`.

    Decoding, resizing and compressing release the GIL. Memory does not grow with the number of files.
    """
    images, iterator = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (3 * task.resolution**2))), iter(files)
    chunks = iter(lambda: list(itertools.islice(iterator, images)), [])

    def convert_chunk(chunk: list[File]) -> list[Converted]:
        return [convert(file, task) for file in chunk]

    with (
        warnings.catch_warnings(),
        contextlib.closing(map_in_order(convert_chunk, chunks, threads=threads)) as converted,
    ):
        ignore_warnings()
        yield itertools.chain.from_iterable(converted)
