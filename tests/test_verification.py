import hashlib
import io
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from facevae_jax.config import DataConfig
from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError
from facevae_jax.data import store
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.drawn import synthetic
from facevae_jax.data.layouts import types
from facevae_jax.data.prepared import builder, conversion, reading, verification
from facevae_jax.data.sources.images import encode_png
from facevae_jax.prepare import verify as verify_command
from tests.conftest import assert_one_line_error, run_module
from tests.test_conversion import flip

MODULE = "facevae_jax.prepare"
R = 64
TRAIN, VALIDATION, TEST = 70, 6, 3


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """Different faces but for: train 5 = train 2, and validation 1 = train 7 = test 2 = test 1."""
    images = synthetic.faces(np.arange(TRAIN + VALIDATION + TEST), resolution=R).copy()
    images[5] = images[2]
    images[[TRAIN + 1, TRAIN + VALIDATION + 1, TRAIN + VALIDATION + 2]] = images[7]
    return images


@pytest.fixture(scope="module")
def whole(faces: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A data_dir with `toy`, in three files of train, with its pixel stores."""
    folder, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    sources = [types.SourceImage(f"{i:03d}.png", folder / f"{i:03d}.png") for i in range(len(faces))]
    for image, face in zip(sources, faces, strict=True):
        image.file.write_bytes(encode_png(face))
    end = TRAIN + VALIDATION
    splits = {"train": sources[:TRAIN], "validation": sources[TRAIN:end], "test": sources[end:]}
    layout = types.Layout(kind="folder", source="source", splits=splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "SHARD_BYTES", 3 * R**2 * 30)
        builder.prepare_dataset(layout, data_dir=data_dir, name="toy", resolution=R, workers=2)
    config = DataConfig(name="toy", resolution=R, data_dir=str(data_dir))
    for split in ("train", "validation"):
        open_dataset(config).images(split)
    return data_dir


@pytest.fixture
def toy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The directory of a copy of the dataset, to be damaged."""
    shutil.copytree(whole / "toy", tmp_path / "data" / "toy")
    return reading.find_dataset(tmp_path / "data", name="toy", resolution=R)


def verify(directory: pathlib.Path) -> verification.Report:
    return verification.verify_dataset(directory, output=directory / "verification", threads=2)


def train_file(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / f"toy-train.array_record-{number:05d}-of-00003"


def listed(directory: pathlib.Path) -> list[tuple[str, ...]]:
    entries = map(json.loads, (directory / "verification" / "duplicates.jsonl").read_text().splitlines())
    return [tuple(f"{end['split']} {end['row']} {end['name']}" for end in entry.values()) for entry in entries]


def test_a_whole_dataset(toy):
    report = verify(toy)
    assert (report.problems, report.notes, report.checksums, len(report.files)) == ([], [], True, 5)
    assert report.images == report.described == {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    assert report.stores == {"pixels/train.npy": "", "pixels/validation.npy": ""}
    written = json.loads((toy / "verification" / "report.json").read_text())
    assert (written["images"], written["problems"]) == (report.images, [])
    assert verify(toy).problems == []  # its own output is no part of the dataset


def test_duplicates_and_leakage(toy):
    """Each image is paired with the first of its kind in each split up to its own, so many copies make few pairs."""
    report = verify(toy)
    first, second, third = "train 7 007.png", "validation 1 071.png", "test 1 077.png"
    assert listed(toy) == [
        ("train 2 002.png", "train 5 005.png"),
        (first, second),
        *((first, third), (second, third)),
        *((first, "test 2 078.png"), (second, "test 2 078.png"), (third, "test 2 078.png")),
    ]
    leakage = {"train/validation": 1, "train/test": 2, "validation/test": 2}
    assert (report.duplicates, report.leakage) == ({"train": 1, "test": 1} | leakage, leakage)
    assert any("2 of 3 test images are in train too" in line for line in report.summary)


def test_a_flipped_byte_costs_one_image(toy):
    path = train_file(toy, 1)
    flip(path, path.stat().st_size // 10)  # where records are: the file is padded to 64 KiB
    report = verify(toy)
    assert report.files[path.name] == "has other bytes than were written"
    (damaged,) = report.damaged
    assert damaged["split"] == "train"
    assert 24 <= damaged["row"] < 60
    assert report.images == {"train": TRAIN - 1, "validation": VALIDATION, "test": TEST}
    assert len(report.problems) == 2


def test_missing_extra_and_truncated_files_are_one_problem_each(toy):
    train_file(toy, 0).unlink()
    shutil.copy(train_file(toy, 1), toy / "toy-extra.array_record-00000-of-00001")
    size = train_file(toy, 2).stat().st_size
    os.truncate(train_file(toy, 2), size - 5)
    report = verify(toy)
    assert report.problems == [
        "toy-extra.array_record-00000-of-00001: is not among those of checksums.json",
        f"{train_file(toy, 2).name}: has {size - 5} bytes where {size} were written",
        f"{train_file(toy, 0).name}: is missing",
    ]
    assert report.images["train"] == 30  # of the other file


@pytest.mark.parametrize(("described", "decoded"), [("33", TRAIN), ("28", TRAIN - 2)])
def test_a_wrong_count(toy, described, decoded):
    path = toy / "dataset_info.json"
    info = json.loads(path.read_text())
    (lengths,) = (split["shardLengths"] for split in info["splits"] if split["name"] == "train")
    lengths[0] = described
    path.write_text(json.dumps(info))
    shutil.rmtree(toy / "pixels")
    report = verify(toy)
    assert report.problems == [f"{train_file(toy, 0).name}: holds 30 records where dataset_info.json says {described}"]
    assert report.images["train"] == decoded
    assert listed(toy)[0] == ("train 2 002.png", "train 5 005.png")


def test_images_that_cannot_be_decoded_or_have_another_shape_are_named(toy, faces):
    """The file is whole as such, so only decoding finds them; each is listed and the others are counted."""
    grey = io.BytesIO()
    Image.new("L", (R, R)).save(grey, "PNG")
    images = [encode_png(face) for face in faces[-TEST:]]
    bad = [images[0][:-300], encode_png(faces[0][:32]), grey.getvalue()]
    (path,) = toy.glob("toy-validation*")
    with conversion.writer(path) as write:
        for i, png in enumerate([*images, *bad]):
            write(conversion.encode_example(png, name=f"{i}.png".encode(), attributes={}))
    (toy / "checksums.json").unlink()
    shutil.rmtree(toy / "pixels")
    report = verify(toy)
    assert [(i["split"], i["row"], i["name"]) for i in report.damaged] == [
        ("validation", i, f"{i}.png") for i in (3, 4, 5)
    ]
    assert "uint8[32, 64, 3], not uint8[64, 64, 3]" in report.problems[1]
    assert "the mode is L, not RGB" in report.problems[2]
    assert report.images["validation"] == 3
    assert any("no checksums.json" in note for note in report.notes)


def test_a_changed_store_is_found_by_its_checksum_and_by_its_images(toy):
    path = toy / "pixels" / "train.npy"
    status, pixels = path.stat(), np.load(path)
    pixels[[11, 40]] = pixels[[40, 11]]
    np.save(path, pixels)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that training would use it
    differs = "2 of 70 rows differ from the dataset's images (11, 40)"
    assert verify(toy).problems == [f"pixels/train.npy: {store.OTHER_BYTES}; {differs}"]
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(record | {"sha256": hashlib.sha256(pixels).hexdigest()}))
    assert verify(toy).problems == [f"pixels/train.npy: {differs}"]


def test_stores_that_are_short_unreadable_or_not_completed(toy):
    store = np.load(toy / "pixels" / "train.npy")
    np.save(toy / "pixels" / "train.npy", store[:-1])
    (toy / "pixels" / "validation.npy").write_bytes(b"\x93NUMPY")
    shutil.copy(toy / "pixels" / "validation.npy", toy / "pixels" / "test.npy")
    report = verify(toy)
    assert report.stores["pixels/train.npy"].startswith("has the shape [69, 64, 64, 3]")
    assert report.stores["pixels/validation.npy"].startswith("cannot be read (")
    assert len(report.problems) == 2
    assert report.notes == ["pixels/test.npy was not completed: the next run makes it again."]


def test_contact_sheets(toy, faces):
    flip(train_file(toy, 0), train_file(toy, 0).stat().st_size // 3)
    (damaged,) = verify(toy).damaged
    expected = faces.copy()
    expected[damaged["row"]] = 255
    rows = np.linspace(0, TRAIN - 1, 64).astype(int)
    assert damaged["row"] in rows
    for split, shown in (("train", expected[rows]), ("validation", faces[TRAIN : TRAIN + VALIDATION])):
        with Image.open(toy / "verification" / f"contact_{split}.png") as sheet:
            np.testing.assert_array_equal(np.asarray(sheet), pictures.grid(shown, columns=8))


def test_errors_of_the_command(toy, tmp_path, capsys):
    data_dir = str(toy.parent.parent.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output='.*file/x' cannot be written to"):
        verify_command(name="toy", resolution=R, data_dir=data_dir, output=str(tmp_path / "file" / "x"))
    flip(toy / "pixels" / "train.npy")
    with pytest.raises(UserError, match=r"toy/64/1\.0\.0: 1 problem \(pixels/train\.npy: .*delete .*pixels, which"):
        verify_command(name="toy", resolution=R, data_dir=data_dir)
    assert "pixel stores: pixels/train.npy is not whole, pixels/validation.npy is whole" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"name=no resolution=64: no such .*name=toy resolution=64\."):
        verify_command(name="no", resolution=R, data_dir=data_dir)


@pytest.mark.slow
def test_command(toy, tmp_path):
    flags = ["verify", "--name=toy", f"--resolution={R}", f"--data_dir={tmp_path}/data", f"--output={tmp_path}/out"]
    result = run_module(MODULE, *flags)
    assert result.returncode == 0, result.stderr
    assert f"whole: {toy}" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"contact_{split}.png" for split in ("test", "train", "validation")),
        "duplicates.jsonl",
        "report.json",
    ]
    train_file(toy, 2).write_bytes(b"")
    assert_one_line_error(run_module(MODULE, *flags), str(toy), "1 problem", train_file(toy, 2).name, "--overwrite")
