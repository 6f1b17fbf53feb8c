"""Writes pictures as one grid, a folder of PNG files, an .npz array or an animation."""

import itertools
import pathlib
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError, expand_home, make_writable_directory, writable_file
from facevae_jax.core.files import atomic_writer
from facevae_jax.core.parallel import available_cpus, map_in_order
from facevae_jax.core.progress import progress_bar
from facevae_jax.data.sources.images import encode_png

Format = Literal["grid", "png", "npz", "gif", "webp", "mp4"]
FORMATS = get_args(Format)
ANIMATED = ("gif", "webp", "mp4")
MAX_NAME_BYTES = 200  # file systems allow 255, with number and extension
MAX_WEBP_SIDE = 16_383  # pixels
MAX_GRID_FACES = 10_000
MAX_SHEET_PICTURES = 100_000  # whose latents are all in memory
MAX_ANIMATION_PIXELS = 2**30  # of all frames, which are in memory
MAX_GRID_PIXELS = 2**28  # 16,384 x 16,384: viewers open no more


class Destination(NamedTuple):
    """A path that can be written, its format, and what is done to pictures on the way."""

    path: pathlib.Path
    format: Format
    scale: int = 1  # each pixel becomes a square of so many on each side; not in an array
    labels: bool = False  # whether a grid says what its rows and columns are


class Labels(NamedTuple):
    """What the rows and columns of a grid are."""

    rows: Sequence[str] = ()
    columns: Sequence[str] = ()


NO_LABELS = Labels()  # of columns; the rows of a grid then have the numbers of their first pictures


def choose(output: str | None, format: str | None, *, verb: str, scale: int = 1, labels: bool = False) -> Destination:
    """What `--output` and `--format` ask for. Each implies the other; the default is the grid `VERB.png`.

    Raises:
      UserError: they contradict each other or `scale` and `labels`, or the path cannot be written.
    """
    suffix = pathlib.PurePath(output or "").suffix.lower().removeprefix(".")
    if format is None:
        format = {"": "png" if output else "grid", "png": "grid"}.get(suffix, suffix)
        if format not in FORMATS:
            raise UserError(
                f"--output={output!r} must end in .png (one grid), .npz, .gif, .webp or .mp4, or be a folder for "
                "single PNG files."
            )
    endings = {"grid": ".png", "png": ""}
    ending = endings.get(format, f".{format}")
    path = expand_home(output or f"{verb}{ending}", name="--output")
    if path.suffix.lower() != ending and not (format == "png" and path.suffix.lower() != ".png"):
        wanted = f"must end in {ending}" if ending else "must be the name of a folder"
        raise UserError(f"--output={str(path)!r} {wanted} for --format={format}.")
    if format == "png" and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise UserError(f"--output={str(path)!r} already has files: give a new folder.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"--output={str(path)!r} is neither a file nor a folder: give the name of one.")
    if path.name in ("", ".."):
        raise UserError(f"--output={output!r} must be the name of a new file or folder.")
    if labels and format != "grid":
        raise UserError(f"--labels beside --format={format}: only a grid has a margin for them: leave them out.")
    if scale > 1 and format == "npz":
        raise UserError(f"--scale={scale} beside --format=npz: an array has the model's pixels: leave it out.")
    if format == "png":
        make_writable_directory(path.parent, name="--output's directory")
    else:
        writable_file(path, name="--output")
    return Destination(path, format, scale, labels)  # type: ignore[arg-type]


def write_stream(
    to: Destination,
    batches: Iterable[UInt8[np.ndarray, "b r r 3"]],
    *,
    count: int,
    columns: int = 0,
    names: Sequence[str] | None = None,
    labels: Labels = NO_LABELS,
) -> None:
    """Writes pictures as they are made; only a grid needs memory for all of them.

    Args:
      to: where and how.
      batches: of pictures.
      count: the number of pictures.
      columns: of a grid; 0: a square one.
      names: of single files, without `.png`; by default their numbers.
      labels: of a grid's rows and columns, where `to` asks for them.

    Raises:
      UserError: the format is an animation.
    """
    with progress_bar(total=count, description=to.path.name) as progress:
        counted = _counted(batches, progress, to.scale)
        if to.format == "npz":
            _write_npz(to.path, counted, count)
        elif to.format == "png":
            _write_files(to.path, counted, unique(names) if names else None)
        elif to.format == "grid":
            columns = min(columns or int(np.ceil(np.sqrt(count))), count)
            images = np.concatenate(list(counted))
            canvas = pictures.grid(images, columns=columns)
            if to.labels:
                rows = labels.rows or [str(first) for first in range(0, count, columns)]
                canvas = pictures.with_labels(canvas, rows=rows, columns=labels.columns, cell=images.shape[1])
            pictures.write_png(to.path, canvas)
        else:
            raise UserError(f"--format={to.format}: these pictures have no order to animate: choose grid, png or npz.")


def check_room(to: Destination, *, count: int, resolution: int, any_number: bool = False) -> None:
    """Raises a UserError, before any work, for more pictures than a grid or the memory for their latents holds.

    Args:
      to: where they are written.
      count: the number of pictures.
      resolution: of a picture.
      any_number: whether latents are made batch by batch.
    """
    most = min(MAX_GRID_FACES, MAX_GRID_PIXELS // (resolution * to.scale) ** 2)
    if to.format in ANIMATED and count * (resolution * to.scale) ** 2 > MAX_ANIMATION_PIXELS:
        raise UserError(f"{count:,} pictures of {resolution * to.scale} pixels are too many to animate: ask for fewer.")
    if to.format == "grid" and count > most:
        raise UserError(f"{count:,} pictures: one grid holds {most:,} at most: ask for fewer, or add --format=png.")
    if count > MAX_SHEET_PICTURES and not any_number:
        raise UserError(f"{count:,} pictures are more than {MAX_SHEET_PICTURES:,}: ask for fewer steps or rows.")


def _counted(batches: Iterable[np.ndarray], progress: Any, scale: int) -> Iterator[np.ndarray]:
    for batch in batches:
        yield pictures.enlarged(batch, scale)
        progress.update(len(batch))


def _write_npz(path: pathlib.Path, batches: Iterator[np.ndarray], count: int) -> None:
    """`arr_0` uint8 [n, r, r, 3], as evaluation scripts after Dhariwal & Nichol 2021 (ADM) read samples."""
    first = next(batches)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:])}
    with (
        atomic_writer(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for batch in itertools.chain([first], batches):
            member.write(np.ascontiguousarray(batch).data)


def _write_files(folder: pathlib.Path, batches: Iterator[np.ndarray], names: Sequence[str] | None) -> None:
    """A folder with all its files, or none; threads compress them, which releases the GIL."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()

    def write(numbered: tuple[int, np.ndarray]) -> None:
        number, image = numbered
        name = names[number] if names else f"{number:06d}"
        (temporary / f"{name}.png").write_bytes(encode_png(image))

    try:
        images = enumerate(itertools.chain.from_iterable(batches))
        for _ in map_in_order(write, images, threads=available_cpus()):
            pass
        temporary.replace(folder)  # an empty folder may exist
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unique(names: Sequence[str]) -> list[str]:
    """File names without extension for any names; equal ones get a number."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        # Long names keep their ends, in which the pictures of one face differ.
        safe = re.sub(r"[^\w.+-]", "_", name).encode(errors="replace")
        stem = safe[-MAX_NAME_BYTES:].decode(errors="ignore") or "face"
        seen[stem] = seen.get(stem, 0) + 1
        result.append(stem if seen[stem] == 1 else f"{stem}_{seen[stem]}")
    return result if len(set(result)) == len(result) else [f"{i:06d}_{name}" for i, name in enumerate(result)]


def write_animation(
    to: Destination,
    images: UInt8[np.ndarray, "rows columns r r 3"],
    *,
    frames_per_second: float,
    loop_back: bool = False,
) -> None:
    """Writes rows of pictures, each a path from left to right, as a GIF or WebP that repeats forever, or as an MP4.

    Args:
      to: where and how.
      images: the pictures; each column is a frame, with all rows side by side.
      frames_per_second: of the animation.
      loop_back: it also plays backwards, so that it repeats without a jump.

    Raises:
      UserError: PyAV is not installed; the frames are too large for WebP.
    """
    across = int(np.ceil(np.sqrt(len(images))))
    frames = [pictures.grid(pictures.enlarged(column, to.scale), columns=across) for column in images.swapaxes(0, 1)]
    frames += frames[-2:0:-1] if loop_back else []
    if to.format == "webp" and max(frames[0].shape) > MAX_WEBP_SIDE:
        side = max(frames[0].shape)
        raise UserError(f"--format=webp: a side of {side:,} pixels is more than {MAX_WEBP_SIDE:,}: choose gif or mp4.")
    with atomic_writer(to.path) as file:
        if to.format == "mp4":
            _write_mp4(file, frames, frames_per_second)
            return
        first, *rest = (Image.fromarray(frame) for frame in frames)
        options: dict[str, Any] = {"quality": 90, "method": 4} if to.format == "webp" else {"optimize": False}
        first.save(
            file,
            format=to.format.upper(),
            save_all=True,
            append_images=rest,
            duration=round(1000 / frames_per_second),  # ms of each frame
            loop=0,
            **options,
        )


def _write_mp4(file: BinaryIO, frames: Sequence[np.ndarray], frames_per_second: float) -> None:
    """As H.264."""
    try:
        import av
    except ImportError as error:
        raise UserError('MP4 needs PyAV: pip install "facevae-jax[video]", or choose .webp or .gif.') from error
    from fractions import Fraction

    height, width = (side + side % 2 for side in frames[0].shape[:2])  # H.264 with 4:2:0 color needs even sides
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            padded = np.pad(
                frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), constant_values=255
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        container.mux(stream.encode())
