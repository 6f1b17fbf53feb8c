"""What image collections look like on disk: FFHQ, CelebA, a folder of images, a TFDS dataset.

A layout is the list of images by split, how to crop them, and what is known about each.
"""

import csv
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from facevae_jax.data.folders import describe_folder, has_images, image_files, require_folder, some
from facevae_jax.data.images import Crop
from facevae_jax.data.records import Record
from facevae_jax.errors import UserError

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
LAYOUTS = ("ffhq", "celeba", "folder", "tfds")
UNKNOWN = math.nan  # value of an attribute that was not labelled

CENTRE_SQUARE = Crop("centre square")
CELEBA_SIZE = (178, 218)  # width and height of the aligned images
CELEBA_CROP = Crop("centre 148x148 of 178x218: left 15, top 35", size=CELEBA_SIZE, box=(15, 35, 163, 183))

FFHQ_THUMBNAILS, FFHQ_IMAGES, FFHQ_FEATURES = "thumbnails128x128", "images1024x1024", "ffhq-features-dataset"
FFHQ_THUMBNAIL_RESOLUTION = 128
FFHQ_FIRST_VALIDATION, FFHQ_SIZE = 60_000, 70_000  # the split of the FFHQ authors
FFHQ_EMOTIONS = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
FFHQ_HAIR_COLOURS = ("black", "brown", "blond", "red", "gray", "other")

CELEBA_IMAGES, CELEBA_ATTRIBUTES, CELEBA_PARTITION = "img_align_celeba", "list_attr_celeba", "list_eval_partition"
CELEBA_SPLITS = {"0": TRAIN, "1": VALIDATION, "2": TEST}
CELEBA_LABELS = {"1": 1.0, "-1": 0.0}

VALIDATION_FRACTION = 0.1  # of a collection that has no split of its own


Meaning = TypeVar("Meaning")


class Attribute(NamedTuple):
    """One labelled property of the images."""

    name: str
    kind: Literal["binary", "continuous"]  # binary: 0 or 1


class SourceImage(NamedTuple):
    """One image of a collection."""

    name: str  # path of the file relative to the source, with forward slashes
    file: pathlib.Path | Record
    attributes: tuple[float, ...] = ()  # in the order of the layout's attributes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A collection of images, in the order in which it is written."""

    kind: str  # one of LAYOUTS
    source: str  # name of the folder or the TFDS dataset, without the folders above it
    splits: Mapping[str, Sequence[SourceImage]]  # none is empty
    attributes: tuple[Attribute, ...] = ()
    crop: Crop = CENTRE_SQUARE
    notes: tuple[str, ...] = ()  # what the user should know, a line each


def ffhq(source: pathlib.Path, *, resolution: int, attributes: pathlib.Path | None = None) -> Layout:
    """FFHQ: `images1024x1024/` or `thumbnails128x128/` with files such as `00000/00011.png`.

    Args:
      source: the folder that holds them, or one of them.
      resolution: up to 128 pixels the thumbnails are preferred.
      attributes: the ffhq-features-dataset; by default the folder of this name in `source`.

    Raises:
      UserError: the folder is not FFHQ, or the attributes cannot be read.
    """
    require_folder(source)
    root, folders = source, [FFHQ_THUMBNAILS, FFHQ_IMAGES]
    if source.name in folders:
        root, folders = source.parent, [source.name]
    elif resolution > FFHQ_THUMBNAIL_RESOLUTION:
        folders.reverse()
    folder = next((root / name for name in folders if (root / name).is_dir()), None)
    expected = f"{FFHQ_THUMBNAILS}/ or {FFHQ_IMAGES}/"
    if folder is None:
        raise wrong_folder(source, expected=expected, layout="ffhq")
    table = _ffhq_labels(root, attributes)
    splits: dict[str, list[SourceImage]] = {}
    for path in image_files(folder):
        number = int(path.stem) if path.stem.isascii() and path.stem.isdigit() else FFHQ_SIZE
        if number >= FFHQ_SIZE:
            raise UserError(
                f"--source={str(source)!r}: {path.relative_to(root).as_posix()} is not an FFHQ file name "
                f"(00000 to {FFHQ_SIZE - 1}): remove it, or use --layout=folder."
            )
        split = TRAIN if number < FFHQ_FIRST_VALIDATION else VALIDATION
        labels = ffhq_attributes(table / f"{path.stem}.json") if table else ()
        splits.setdefault(split, []).append(SourceImage(path.relative_to(root).as_posix(), path, labels))
    if not splits:
        raise wrong_folder(folder, expected="PNG or JPEG files such as 00000/00011.png", layout="ffhq")
    return Layout(kind="ffhq", source=source.name, splits=in_order(splits), attributes=FFHQ_ATTRIBUTES if table else ())


def _ffhq_labels(root: pathlib.Path, given: pathlib.Path | None) -> pathlib.Path | None:
    """The folder of the JSON files; None where none was given and none is in its usual place."""
    folder = given or root / FFHQ_FEATURES
    for candidate in (folder / "json", folder):
        if next(candidate.glob("*.json"), None) is not None:
            return candidate
    if given is None:
        return None
    raise UserError(
        f"--attributes={str(given)!r}: expected the ffhq-features-dataset (json/00000.json and so on), "
        f"{describe_folder(given)}: download it from github.com/DCGM/ffhq-features-dataset, or leave the flag out."
    )


def _yes(name: str) -> Callable[[Any], float]:
    return lambda value: float(value == name)


# Attribute -> (kind, keys that lead to the value in `faceAttributes`, conversion of the value)
_FFHQ_FIELDS: dict[str, tuple[Literal["binary", "continuous"], tuple[str, ...], Callable[[Any], float]]] = {
    "age": ("continuous", ("age",), float),
    "smile": ("continuous", ("smile",), float),
    "male": ("binary", ("gender",), _yes("male")),
    "glasses": ("binary", ("glasses",), lambda value: float(value != "NoGlasses")),
    **{f"head_{angle}": ("continuous", ("headPose", angle), float) for angle in ("pitch", "roll", "yaw")},
    **{hair: ("continuous", ("facialHair", hair), float) for hair in ("moustache", "beard", "sideburns")},
    "bald": ("continuous", ("hair", "bald"), float),
    "eye_makeup": ("binary", ("makeup", "eyeMakeup"), float),
    "lip_makeup": ("binary", ("makeup", "lipMakeup"), float),
    **{f"emotion_{name}": ("continuous", ("emotion", name), float) for name in FFHQ_EMOTIONS},
}
FFHQ_ATTRIBUTES = (
    *(Attribute(name, kind) for name, (kind, _, _) in _FFHQ_FIELDS.items()),
    *(Attribute(f"hair_{colour}", "continuous") for colour in FFHQ_HAIR_COLOURS),
)


def ffhq_attributes(path: pathlib.Path) -> tuple[float, ...]:
    """The values of `FFHQ_ATTRIBUTES` in one file of the ffhq-features-dataset.

    Angles are in degrees, ages in years, everything else from 0 to 1. Where no face was found, or the file is missing,
    all are unknown; hair colours are unknown where no hair was seen.

    Raises:
      UserError: the file is not what the dataset's documentation describes.
    """
    unknown = (UNKNOWN,) * len(FFHQ_ATTRIBUTES)
    try:
        faces = json.loads(path.read_bytes())
        if not faces:
            return unknown
        face = faces[0]["faceAttributes"]
        values = [_ffhq_value(face, keys, read) for _, keys, read in _FFHQ_FIELDS.values()]
        colours = {entry["color"]: float(entry["confidence"]) for entry in face["hair"]["hairColor"]}
    except FileNotFoundError:
        return unknown
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is not a file of the ffhq-features-dataset: download it anew, or remove it."
        ) from error
    hair = (colours.get(colour, 0.0) if colours else UNKNOWN for colour in FFHQ_HAIR_COLOURS)
    return (*values, *hair)


def _ffhq_value(face: Any, keys: tuple[str, ...], read: Callable[[Any], float]) -> float:
    for key in keys:
        face = face.get(key)
        if face is None:
            return UNKNOWN
    return read(face)


def celeba(source: pathlib.Path) -> Layout:
    """CelebA, aligned and cropped: `img_align_celeba/`, `list_attr_celeba.txt` and `list_eval_partition.txt`.

    The two lists may be the CSV files of Kaggle's copy, and the three may lie in Img/, Anno/ and Eval/ as in the
    authors' copy.

    Raises:
      UserError: the folder is not CelebA, or its lists are damaged or do not name all the images.
    """
    require_folder(source)
    folder = next((p for p in (source / CELEBA_IMAGES, source / "Img" / CELEBA_IMAGES) if p.is_dir()), None)
    if folder is None:
        raise wrong_folder(source, expected=f"{CELEBA_IMAGES}/", layout="celeba")
    files = {path.name: path for path in image_files(folder)}
    if not files:
        raise wrong_folder(folder, expected="JPEG files such as 000001.jpg", layout="celeba")
    names, labels = _celeba_list(source, CELEBA_ATTRIBUTES, "Anno", CELEBA_LABELS)
    _, partition = _celeba_list(source, CELEBA_PARTITION, "Eval", CELEBA_SPLITS)
    for table, found in ((CELEBA_ATTRIBUTES, labels), (CELEBA_PARTITION, partition)):
        missing = [name for name in files if name not in found]
        if missing:
            raise UserError(
                f"--source={str(source)!r}: {len(missing)} of {len(files)} images are not in {table} "
                f"({some(missing)}): download that list anew."
            )
    splits: dict[str, list[SourceImage]] = {}
    for name, path in files.items():
        image = SourceImage(path.relative_to(source).as_posix(), path, labels[name])
        splits.setdefault(partition[name][0], []).append(image)
    absent = len(partition.keys() - files.keys())
    note = f"{absent} of the {len(partition)} images of {CELEBA_PARTITION} are not in {folder}: the rest is prepared."
    return Layout(
        kind="celeba",
        source=source.name,
        splits=in_order(splits),
        attributes=tuple(Attribute(name, "binary") for name in names),
        crop=CELEBA_CROP,
        notes=(note,) if absent else (),
    )


def _celeba_list(
    source: pathlib.Path, stem: str, folder: str, meanings: Mapping[str, Meaning]
) -> tuple[list[str], dict[str, tuple[Meaning, ...]]]:
    """The columns of one of CelebA's lists, and its values by image file name."""
    paths = [source / sub / f"{stem}{suffix}" for suffix in (".txt", ".csv") for sub in (".", folder)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise wrong_folder(source, expected=f"{stem}.txt", layout="celeba", remedy=f"put CelebA's {stem}.txt there")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
    rows = [row for row in rows if row]
    columns: list[str] = []
    if path.suffix == ".csv":
        columns, rows = rows[0][1:] if rows else [], rows[1:]
    elif stem == CELEBA_ATTRIBUTES:  # a line with the number of images, then the names
        columns, rows = rows[1] if len(rows) > 1 else [], rows[2:]
    width = len(columns) or 1
    values = {}
    for number, (name, *words) in enumerate(rows, start=1):
        if len(words) != width or not all(word in meanings for word in words):
            raise UserError(
                f"{path}: the entry {number}, {name!r}, does not have {width} values out of {', '.join(meanings)}: "
                "download the list anew."
            )
        values[name] = tuple(meanings[word] for word in words)
    return columns, values


def folder(source: pathlib.Path) -> Layout:
    """Any folder of PNG, JPEG or WebP files, however deep; a tenth of them, chosen by the hash of the name, validates.

    Raises:
      UserError: there is no such folder, or no image in it.
    """
    require_folder(source)
    images = [SourceImage(path.relative_to(source).as_posix(), path) for path in image_files(source)]
    if not images:
        raise wrong_folder(source, expected="PNG, JPEG or WebP files", layout="folder")
    fitting = guess_layout(source)
    note = f"this folder fits --layout={fitting}, which knows its splits and attributes."
    return Layout(
        kind="folder",
        source=source.name,
        splits=split_by_hash(images),
        notes=() if fitting in (None, "folder") else (note,),
    )


def split_by_hash(images: Sequence[SourceImage]) -> dict[str, list[SourceImage]]:
    """Splits images by their names alone: about 90% train, the rest validation.

    No split is left empty where there are two images: the image with the smallest hash validates, the one with the
    largest trains.
    """
    hashes = {image.name: _unit_hash(image.name) for image in images}
    smallest, largest = min(hashes, key=hashes.__getitem__), max(hashes, key=hashes.__getitem__)
    splits: dict[str, list[SourceImage]] = {TRAIN: [], VALIDATION: []}
    for image in images:
        validates = hashes[image.name] < VALIDATION_FRACTION or image.name == smallest
        splits[VALIDATION if validates and image.name != largest else TRAIN].append(image)
    return in_order(splits)


def _unit_hash(name: str) -> float:
    """A number from 0 to 1 that depends on `name` only."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def in_order(splits: Mapping[str, list[SourceImage]]) -> dict[str, list[SourceImage]]:
    """The splits that have images, in their usual order; images by name."""
    names = sorted(splits, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    return {name: sorted(splits[name], key=lambda image: image.name) for name in names if splits[name]}


def guess_layout(path: pathlib.Path) -> str | None:
    """The layout that a folder fits, if any."""
    ffhq_folders = (FFHQ_THUMBNAILS, FFHQ_IMAGES)
    if path.name in ffhq_folders or any((path / name).is_dir() for name in ffhq_folders):
        return "ffhq"
    if (path / CELEBA_IMAGES).is_dir() or (path / "Img" / CELEBA_IMAGES).is_dir():
        return "celeba"
    return "folder" if has_images(path) else None


def wrong_folder(path: pathlib.Path, *, expected: str, layout: str, remedy: str = "") -> UserError:
    """The error for a folder that is not what its layout expects, with the command to try next."""
    fitting = guess_layout(path)
    if not remedy:
        kind, source = (fitting, path) if fitting not in (None, layout) else (layout, "DIR")
        remedy = f"try python -m facevae_jax.prepare --layout={kind} --source={source} --resolution=64"
    return UserError(f"--source={str(path)!r}: expected {expected}, {describe_folder(path)}: {remedy}.")
