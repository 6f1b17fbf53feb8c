"""FFHQ: `images1024x1024/` or `thumbnails128x128/`, and the labels of the ffhq-features-dataset."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int

from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts import types
from facevae_jax.data.sources.names import FFHQ_FOLDERS
from facevae_jax.data.sources.opening import Folder, Listing, Source, list_files, open_source

FEATURES = "ffhq-features-dataset"
THUMBNAIL_RESOLUTION = 128
FIRST_VALIDATION, SIZE = 60_000, 70_000  # the split of the FFHQ authors
EMOTIONS = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
HAIR_COLORS = ("black", "brown", "blond", "red", "gray", "other")


def ffhq_layout(path: pathlib.Path, *, resolution: int, attributes: pathlib.Path | None = None) -> types.Layout:
    """FFHQ: `images1024x1024/` or `thumbnails128x128/` with files such as `00000/00011.png`.

    `path` has them or is one of them; up to a resolution of 128 pixels the thumbnails are preferred. `attributes` is
    the ffhq-features-dataset, a folder or .zip file; by default the folder of this name in `path`.

    Raises UserError: the source is not FFHQ, or the attributes cannot be read.
    """
    source = open_source(path)
    if path.name in FFHQ_FOLDERS:
        folder, listing = path.name, list_files(source)
        beside = path.parent / FEATURES
        features = Folder(beside) if beside.is_dir() else source
    else:
        wanted = FFHQ_FOLDERS if resolution <= THUMBNAIL_RESOLUTION else FFHQ_FOLDERS[::-1]
        folder = next((name for name in wanted if source.has_folder(name)), "")
        if not folder:
            raise types.wrong_source(source, expected="thumbnails128x128/ or images1024x1024/", layout="ffhq")
        listing, features = list_files(source, folder), source
    rows = listing.image_rows
    if not len(rows):
        inside = "" if path.name == folder else folder
        raise types.wrong_source(source, expected="image files such as 00000/00011.png", layout="ffhq", inside=inside)
    numbers = np.array([_number(listing.names[row], f"{folder}/", path) for row in rows])
    values = _labels(listing, rows, features, attributes)
    trains = numbers < FIRST_VALIDATION
    splits = {types.TRAIN: rows[trains], types.VALIDATION: rows[~trains]}
    return types.Layout(
        kind="ffhq",
        source=path.name,
        splits=types.splits_of(listing, splits, prefix=f"{folder}/", values=values),
        attributes=() if values is None else ATTRIBUTES,
        notes=tuple(filter(None, (*source.notes, listing.ignored_note))),
    )


def _number(name: str, prefix: str, path: pathlib.Path) -> int:
    """The number of an image, which decides its split."""
    stem = pathlib.PurePosixPath(name).stem
    number = int(stem) if stem.isascii() and stem.isdigit() else SIZE
    if number >= SIZE:
        raise UserError(f"--source={str(path)!r}: {prefix}{name} is not an FFHQ file name: try --layout=folder.")
    return number


def _labels(
    listing: Listing, rows: Int[np.ndarray, " n"], features: Source, given: pathlib.Path | None
) -> Float32[np.ndarray, "m a"] | None:
    """The attributes of the files at `rows`; None if none were given and none are in their usual place."""
    source = open_source(given) if given else features
    places = ("json", "") if given or features.path.name == FEATURES else (f"{FEATURES}/json", FEATURES)
    folder = next((place for place in places if _has_json(source, place)), None)
    if folder is None:
        if given is None:
            return None
        raise UserError(
            f"--attributes={str(given)!r}: expected the ffhq-features-dataset (json/00000.json and so on), "
            f"{source.describe()}: download it from github.com/DCGM/ffhq-features-dataset, or leave the flag out."
        )
    values = np.full((len(listing.names), len(ATTRIBUTES)), types.UNKNOWN, np.float32)
    for row in rows:
        name = f"{folder}/{pathlib.PurePosixPath(listing.names[row]).stem}.json".lstrip("/")
        content = source.read(name)
        if content is not None:
            values[row] = ffhq_attributes(content, name=str(source.path / name))
    return values


def _has_json(source: Source, folder: str) -> bool:
    return any("/" not in name and name.endswith(".json") for name in source.names(folder))


# Attribute -> (kind, keys that lead to the value in `faceAttributes`, conversion of the value)
_FIELDS: dict[str, tuple[Literal["binary", "continuous"], tuple[str, ...], Callable[[Any], float]]] = {
    "age": ("continuous", ("age",), float),
    "smile": ("continuous", ("smile",), float),
    "male": ("binary", ("gender",), lambda value: float(value == "male")),
    "glasses": ("binary", ("glasses",), lambda value: float(value != "NoGlasses")),
    **{f"head_{angle}": ("continuous", ("headPose", angle), float) for angle in ("pitch", "roll", "yaw")},
    **{hair: ("continuous", ("facialHair", hair), float) for hair in ("moustache", "beard", "sideburns")},
    "bald": ("continuous", ("hair", "bald"), float),
    "eye_makeup": ("binary", ("makeup", "eyeMakeup"), float),
    "lip_makeup": ("binary", ("makeup", "lipMakeup"), float),
    **{f"emotion_{name}": ("continuous", ("emotion", name), float) for name in EMOTIONS},
}
ATTRIBUTES = (
    *(types.Attribute(name, kind) for name, (kind, _, _) in _FIELDS.items()),
    *(types.Attribute(f"hair_{color}", "continuous") for color in HAIR_COLORS),
)


def ffhq_attributes(content: bytes, *, name: str) -> tuple[float, ...]:
    """The values of `ATTRIBUTES` in one file of the ffhq-features-dataset.

    Angles are in degrees, ages in years, everything else from 0 to 1. If no face was found, all are unknown; hair
    colors are unknown if no hair was seen.

    Raises UserError: the file, `name`, is not what the dataset's documentation describes.
    """
    try:
        faces = json.loads(content)
        if not faces:
            return (types.UNKNOWN,) * len(ATTRIBUTES)
        face = faces[0]["faceAttributes"]
        values = [_value(face, keys, read) for _, keys, read in _FIELDS.values()]
        colors = {entry["color"]: float(entry["confidence"]) for entry in face["hair"]["hairColor"]}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{name} is not a file of the ffhq-features-dataset: download it again.") from error
    hair = (colors.get(color, 0.0) if colors else types.UNKNOWN for color in HAIR_COLORS)
    return (*values, *hair)


def _value(face: Any, keys: tuple[str, ...], read: Callable[[Any], float]) -> float:
    for key in keys:
        face = face.get(key)
        if face is None:
            return types.UNKNOWN
    return read(face)
