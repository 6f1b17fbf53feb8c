"""FFHQ: `images1024x1024/` or `thumbnails128x128/`, and the labels of the ffhq-features-dataset."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int

from facevae_jax.data.layouts import (
    FFHQ_FOLDERS,
    FFHQ_IMAGES,
    FFHQ_THUMBNAILS,
    TRAIN,
    UNKNOWN,
    VALIDATION,
    Attribute,
    Layout,
    collect_notes,
    in_order,
    labelled_image,
    wrong_source,
)
from facevae_jax.data.sources import Listing, Source, ignored_note, image_rows, open_source
from facevae_jax.errors import UserError

FEATURES = "ffhq-features-dataset"
THUMBNAIL_RESOLUTION = 128
FIRST_VALIDATION, SIZE = 60_000, 70_000  # the split of the FFHQ authors
EMOTIONS = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
HAIR_COLOURS = ("black", "brown", "blond", "red", "gray", "other")


def ffhq(path: pathlib.Path, *, resolution: int, attributes: pathlib.Path | None = None) -> Layout:
    """FFHQ: `images1024x1024/` or `thumbnails128x128/` with files such as `00000/00011.png`.

    Args:
      path: the folder or archive that holds them, or one of them.
      resolution: up to 128 pixels the thumbnails are preferred.
      attributes: the ffhq-features-dataset, a folder or an archive; by default the folder of this name in `path`.

    Raises:
      UserError: the source is not FFHQ, or the attributes cannot be read.
    """
    source = open_source(path)
    if path.name in FFHQ_FOLDERS:
        folder, listing = path.name, source.files()
        beside = path.parent / FEATURES
        features = open_source(beside) if beside.is_dir() else source
    else:
        wanted = FFHQ_FOLDERS if resolution <= THUMBNAIL_RESOLUTION else FFHQ_FOLDERS[::-1]
        folder = next((name for name in wanted if source.has_folder(name)), "")
        if not folder:
            raise wrong_source(source, expected=f"{FFHQ_THUMBNAILS}/ or {FFHQ_IMAGES}/", layout="ffhq")
        listing, features = source.files(folder), source
    rows = image_rows(listing)
    if not len(rows):
        inside = "" if path.name == folder else folder
        raise wrong_source(source, expected="PNG or JPEG files such as 00000/00011.png", layout="ffhq", inside=inside)
    numbers = np.array([_number(listing.names[row], f"{folder}/", path) for row in rows])
    values = _labels(listing, rows, features, attributes)
    make = functools.partial(labelled_image, listing, prefix=folder, values=values)
    trains = numbers < FIRST_VALIDATION
    return Layout(
        kind="ffhq",
        source=path.name,
        splits=in_order({TRAIN: rows[trains], VALIDATION: rows[~trains]}, make),
        attributes=() if values is None else ATTRIBUTES,
        notes=collect_notes(*source.notes, ignored_note(listing)),
    )


def _number(name: str, prefix: str, path: pathlib.Path) -> int:
    """The number of an image, which decides its split."""
    stem = pathlib.PurePosixPath(name).stem
    number = int(stem) if stem.isascii() and stem.isdigit() else SIZE
    if number >= SIZE:
        raise UserError(
            f"--source={str(path)!r}: {prefix}{name} is not an FFHQ file name "
            f"(00000 to {SIZE - 1}): remove it, or use --layout=folder."
        )
    return number


def _labels(
    listing: Listing, rows: Int[np.ndarray, " n"], features: Source, given: pathlib.Path | None
) -> Float32[np.ndarray, "m a"] | None:
    """The attributes of the files at `rows`; None where none were given and none are in their usual place."""
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
    values = np.full((len(listing.names), len(ATTRIBUTES)), UNKNOWN, np.float32)
    for row in rows:
        name = f"{folder}/{pathlib.PurePosixPath(listing.names[row]).stem}.json".lstrip("/")
        content = source.read(name)
        if content is not None:
            values[row] = ffhq_attributes(content, name=str(source.path / name))
    return values


def _has_json(source: Source, folder: str) -> bool:
    return any("/" not in name and name.endswith(".json") for name in source.files(folder).names)


def _yes(name: str) -> Callable[[Any], float]:
    return lambda value: float(value == name)


# Attribute -> (kind, keys that lead to the value in `faceAttributes`, conversion of the value)
_FIELDS: dict[str, tuple[Literal["binary", "continuous"], tuple[str, ...], Callable[[Any], float]]] = {
    "age": ("continuous", ("age",), float),
    "smile": ("continuous", ("smile",), float),
    "male": ("binary", ("gender",), _yes("male")),
    "glasses": ("binary", ("glasses",), lambda value: float(value != "NoGlasses")),
    **{f"head_{angle}": ("continuous", ("headPose", angle), float) for angle in ("pitch", "roll", "yaw")},
    **{hair: ("continuous", ("facialHair", hair), float) for hair in ("moustache", "beard", "sideburns")},
    "bald": ("continuous", ("hair", "bald"), float),
    "eye_makeup": ("binary", ("makeup", "eyeMakeup"), float),
    "lip_makeup": ("binary", ("makeup", "lipMakeup"), float),
    **{f"emotion_{name}": ("continuous", ("emotion", name), float) for name in EMOTIONS},
}
ATTRIBUTES = (
    *(Attribute(name, kind) for name, (kind, _, _) in _FIELDS.items()),
    *(Attribute(f"hair_{colour}", "continuous") for colour in HAIR_COLOURS),
)


def ffhq_attributes(content: bytes, *, name: str) -> tuple[float, ...]:
    """The values of `ATTRIBUTES` in one file of the ffhq-features-dataset.

    Angles are in degrees, ages in years, everything else from 0 to 1. Where no face was found all are unknown; hair
    colours are unknown where no hair was seen.

    Raises:
      UserError: the file, `name`, is not what the dataset's documentation describes.
    """
    try:
        faces = json.loads(content)
        if not faces:
            return (UNKNOWN,) * len(ATTRIBUTES)
        face = faces[0]["faceAttributes"]
        values = [_value(face, keys, read) for _, keys, read in _FIELDS.values()]
        colours = {entry["color"]: float(entry["confidence"]) for entry in face["hair"]["hairColor"]}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{name} is not a file of the ffhq-features-dataset: download it anew, or remove it."
        ) from error
    hair = (colours.get(colour, 0.0) if colours else UNKNOWN for colour in HAIR_COLOURS)
    return (*values, *hair)


def _value(face: Any, keys: tuple[str, ...], read: Callable[[Any], float]) -> float:
    for key in keys:
        face = face.get(key)
        if face is None:
            return UNKNOWN
    return read(face)
