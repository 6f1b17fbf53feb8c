import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from facevae_jax import pictures
from facevae_jax import verify as command
from facevae_jax.config import DataConfig
from facevae_jax.data import builder, dataset, duplicates, layouts, pixels, records, synthetic, verification
from facevae_jax.data.images import encode_png
from facevae_jax.errors import UserError
from tests.conftest import assert_one_line_error, run_module

MODULE = "facevae_jax.prepare"
R = 64
TRAIN, VALIDATION, TEST = 70, 6, 3


def recompressed(image: np.ndarray) -> np.ndarray:
    """The picture brightened and saved as JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.minimum(image * 1.1, 255).astype(np.uint8)).save(file, "JPEG", quality=70)
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """Different faces but for: train 5 = train 2, train 9 nearly train 3, validation 1 = train 7, test 2 nearly
    train 8; and two flat images, whose hashes are equal, at train 20 and 21."""
    images = synthetic.faces(np.arange(TRAIN + VALIDATION + TEST), resolution=R).copy()
    images[5] = images[2]
    images[9] = recompressed(images[3])
    images[TRAIN + 1] = images[7]
    images[TRAIN + VALIDATION + 2] = recompressed(images[8])
    images[20], images[21] = 100, 180
    return images


@pytest.fixture(scope="module")
def whole(faces: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A data_dir with `toy`, in three files of train, with its pixel stores."""
    folder, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    sources = []
    for i, face in enumerate(faces):
        path = folder / f"{i:03d}.png"
        path.write_bytes(encode_png(face))
        sources.append(layouts.SourceImage(path.name, path))
    ends = (TRAIN, TRAIN + VALIDATION)
    splits = {"train": sources[: ends[0]], "validation": sources[ends[0] : ends[1]], "test": sources[ends[1] :]}
    layout = layouts.Layout(kind="folder", source="source", splits=splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facevae_jax.data.conversion.SHARD_BYTES", 3 * R**2 * 30)
        builder.prepare_dataset(layout, data_dir=data_dir, name="toy", resolution=R, workers=2)
    pixels.open_splits(DataConfig(name="toy", resolution=R, data_dir=str(data_dir)))
    return data_dir


@pytest.fixture
def toy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The directory of a copy of the dataset, to be damaged."""
    shutil.copytree(whole / "toy", tmp_path / "data" / "toy")
    return dataset.find_dataset(tmp_path / "data", name="toy", resolution=R)


def verify(directory: pathlib.Path) -> verification.Report:
    return verification.verify_dataset(directory, output=directory / "verification", threads=2)


def train_file(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / f"toy-train.array_record-{number:05d}-of-00003"


def listed(directory: pathlib.Path) -> list[tuple[str, str, int, str, int]]:
    entries = map(json.loads, (directory / "verification" / "duplicates.jsonl").read_text().splitlines())
    return [
        (e["kind"], e["first"]["split"], e["first"]["row"], e["second"]["split"], e["second"]["row"]) for e in entries
    ]


def test_a_whole_dataset(toy):
    report = verify(toy)
    assert report.problems == []
    assert report.notes == []
    assert report.images == report.described == {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    assert report.checksums
    assert len(report.files) == 5
    assert report.stores == {"pixels/train.npy": "", "pixels/validation.npy": ""}
    written = json.loads((toy / "verification" / "report.json").read_text())
    assert written["images"] == report.images
    assert written["problems"] == []
    assert verify(toy).problems == []  # its own output is no part of the dataset


def test_duplicates_and_leakage_and_nothing_else(toy):
    report = verify(toy)
    assert listed(toy) == [
        ("exact", "train", 2, "train", 5),
        ("exact", "train", 7, "validation", 1),
        ("near", "train", 3, "train", 9),
        ("near", "train", 8, "test", 2),
    ]
    assert report.duplicates == {
        "exact": {"train": 1, "train/validation": 1},
        "near": {"train": 1, "train/test": 1},
    }
    assert report.leakage == {"train/validation": 1, "train/test": 1}
    first = json.loads((toy / "verification" / "duplicates.jsonl").read_text().splitlines()[1])
    assert first["first"] == {"split": "train", "row": 7, "name": "007.png"}
    assert first["second"] == {"split": "validation", "row": 1, "name": f"{TRAIN + 1:03d}.png"}
    assert "leakage: 1 of 6 validation images are in train too, 1 of 3 test images are in train too" in report.summary


def test_without_imagehash_equal_pixels_are_found(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    report = verify(toy)
    assert [kind for kind, *_ in listed(toy)] == ["exact", "exact"]
    assert report.problems == []
    assert any('pip install "facevae-jax[verify]"' in note for note in report.notes)


def flip(path: pathlib.Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


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


def test_a_flipped_byte_outside_the_records_is_found_by_the_checksum(toy):
    path = train_file(toy, 0)
    flip(path, path.stat().st_size - 1)
    assert verify(toy).problems == [f"{path.name}: has other bytes than were written"]


def test_a_truncated_file_is_one_problem(toy):
    path = train_file(toy, 2)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    report = verify(toy)
    (problem,) = report.problems
    assert f"{path.name}: has {size - 5} bytes where {size} were written; cannot be read (" in problem
    assert "\n" not in problem
    assert report.images["train"] == 60  # of the other two files


def test_missing_extra_and_mixed_up_files(toy):
    train_file(toy, 0).unlink()
    shutil.copy(train_file(toy, 1), toy / "toy-extra.array_record-00000-of-00001")
    report = verify(toy)
    assert report.problems == [
        "toy-extra.array_record-00000-of-00001: is not among those of checksums.json",
        f"{train_file(toy, 0).name}: is missing",
    ]
    assert report.images["train"] == 40


@pytest.mark.parametrize(("described", "decoded"), [("33", TRAIN), ("28", TRAIN - 2)])
def test_a_wrong_count(toy, described, decoded):
    path = toy / "dataset_info.json"
    info = json.loads(path.read_text())
    (train,) = [split for split in info["splits"] if split["name"] == "train"]
    assert train["shardLengths"] == ["30", "30", "10"]
    train["shardLengths"][0] = described
    path.write_text(json.dumps(info))
    shutil.rmtree(toy / "pixels")
    report = verify(toy)
    assert report.problems == [f"{train_file(toy, 0).name}: holds 30 records where dataset_info.json says {described}"]
    assert report.images["train"] == decoded
    assert listed(toy)[0] == ("exact", "train", 2, "train", 5)


def test_images_that_cannot_be_decoded_or_have_another_shape_are_named(toy, faces):
    """The file is whole as such, so only decoding finds them; each is listed and the others are counted."""
    grey = io.BytesIO()
    Image.new("L", (R, R)).save(grey, "PNG")
    images = [encode_png(face) for face in faces[-TEST:]]
    bad = [images[0][:-300], encode_png(faces[0][:32]), grey.getvalue()]
    (path,) = toy.glob("toy-validation*")
    with records.writer(path) as write:
        for i, png in enumerate([*images, *bad]):
            write(records.encode_example(png, name=f"{i}.png".encode(), attributes={}))
    (toy / "checksums.json").unlink()
    shutil.rmtree(toy / "pixels")
    report = verify(toy)
    assert [(i["split"], i["row"], i["name"]) for i in report.damaged] == [
        ("validation", i, f"{i}.png") for i in (3, 4, 5)
    ]
    assert "uint8[32, 64, 3], not uint8[64, 64, 3]" in report.problems[1]
    assert "uint8[64, 64], not uint8[64, 64, 3]" in report.problems[2]
    assert report.images["validation"] == 3
    assert any("no checksums.json" in note for note in report.notes)


def change_store(directory: pathlib.Path, change: Callable[[np.ndarray], None]) -> None:
    """Without a trace in the file's size or time, so that training would use it."""
    path = directory / "pixels" / "train.npy"
    status = path.stat()
    store = np.load(path)
    change(store)
    np.save(path, store)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_a_changed_pixel_of_a_store(toy):
    def change(store: np.ndarray) -> None:
        store[66, 5, 6, 1] ^= 1

    change_store(toy, change)
    assert verify(toy).problems == [
        "pixels/train.npy: has other bytes than were written; 1 of 70 rows differ from the dataset's images (66)"
    ]


def test_rows_of_a_store_in_another_order(toy):
    """Its checksum is made anew: only the images tell."""

    def change(store: np.ndarray) -> None:
        store[[11, 40]] = store[[40, 11]]

    change_store(toy, change)
    path = toy / "pixels" / "train.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"sha256": pixels._checksum(toy / "pixels" / "train.npy")}))
    assert verify(toy).problems == ["pixels/train.npy: 2 of 70 rows differ from the dataset's images (11, 40)"]


def test_stores_that_are_short_unreadable_or_not_completed(toy):
    store = np.load(toy / "pixels" / "train.npy")
    np.save(toy / "pixels" / "train.npy", store[:-1])
    (toy / "pixels" / "validation.npy").write_bytes(b"\x93NUMPY")
    shutil.copy(toy / "pixels" / "validation.npy", toy / "pixels" / "test.npy")
    report = verify(toy)
    assert report.stores["pixels/train.npy"].startswith("is uint8[69, 64, 64, 3], recorded as [70, 64, 64, 3], not")
    assert report.stores["pixels/validation.npy"].startswith("cannot be read (")
    assert len(report.problems) == 2
    assert report.notes == ["pixels/test.npy was not completed: the next run makes it anew."]


def test_contact_sheets(toy, faces):
    flip(train_file(toy, 0), train_file(toy, 0).stat().st_size // 3)
    (damaged,) = verify(toy).damaged
    expected = faces.copy()
    expected[damaged["row"]] = 255
    rows = np.linspace(0, TRAIN - 1, 64).astype(int)
    assert damaged["row"] in rows
    with Image.open(toy / "verification" / "contact_train.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), pictures.grid(expected[rows], columns=8))
    with Image.open(toy / "verification" / "contact_validation.png") as sheet:
        shown = pictures.grid(faces[TRAIN : TRAIN + VALIDATION], columns=8)
        np.testing.assert_array_equal(np.asarray(sheet), shown)


def test_candidates_are_those_of_comparing_all_pairs():
    generator = np.random.default_rng(0)
    fingerprints = np.zeros(3000, duplicates.FINGERPRINT)
    base = generator.integers(0, 2**63, (300, 2), np.uint64).repeat(10, axis=0)
    flips = (np.uint64(1) << generator.integers(0, 64, (3000, 2, 4), np.uint64)).astype(np.uint64)
    fingerprints["phash"], fingerprints["dhash"] = (base ^ np.bitwise_xor.reduce(flips, axis=2)).T
    fingerprints["digest"] = np.arange(3000)
    fingerprints["kind"] = duplicates.COMPARABLE
    found, left_out = duplicates.near_candidates(fingerprints, np.repeat([0, 1], 1500).astype(np.uint8))
    phash, dhash = (np.bitwise_count(h[:, None] ^ h) for h in (fingerprints["phash"], fingerprints["dhash"]))
    expected = np.argwhere(np.triu((phash <= 6) & (dhash <= 8), 1))
    assert left_out == 0
    assert len(expected) > 1000
    np.testing.assert_array_equal(found, expected)


def test_very_many_equal_images_make_few_pairs():
    fingerprints = np.zeros(20_000, duplicates.FINGERPRINT)
    fingerprints["kind"] = duplicates.COMPARABLE
    splits = np.repeat([0, 1], [19_000, 1_000]).astype(np.uint8)
    pairs = duplicates.exact_pairs(fingerprints, splits)
    assert len(pairs) == 18_999 + 1_000 + 999  # with the first of their own split, and of the one before
    assert len(duplicates.near_candidates(fingerprints, splits)[0]) == 0
    fingerprints["digest"] = np.arange(20_000)  # other pixels, the same hash
    assert len(duplicates.near_candidates(fingerprints, splits)[0]) == 18_999 + 1_000 + 999
    fingerprints["phash"] = 1 + np.arange(20_000) % 64  # of few different hashes
    assert len(duplicates.near_candidates(fingerprints, splits)[0]) < 20 * 20_000


def test_crowds_of_alike_images_are_cut_and_told(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_FOUND", 20)
    fingerprints = np.zeros(256, duplicates.FINGERPRINT)
    fingerprints["phash"] = fingerprints["digest"] = np.arange(256)  # all within 8 bits
    fingerprints["kind"] = duplicates.COMPARABLE
    pairs, left_out = duplicates.near_candidates(fingerprints, np.zeros(256, np.uint8))
    assert 256 < len(pairs) <= 20 * 256
    assert left_out > 200
    assert set(pairs.ravel()) == set(range(256))


def test_flat_images_have_no_perceptual_hash(faces):
    noise = np.random.default_rng(0).integers(100, 106, (R, R, 3)).astype(np.uint8)
    kinds = [duplicates.fingerprint(image, perceptual=True)[3] for image in (noise, faces[20], faces[0])]
    assert kinds == [duplicates.DECODED, duplicates.DECODED, duplicates.COMPARABLE]


def test_an_output_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output='.*file/x' cannot be written to") as caught:
        verification.verify_dataset(toy, output=tmp_path / "file" / "x", threads=1)
    assert "\n" not in str(caught.value)


def test_the_remedy_is_told(toy, capsys):
    data_dir = str(toy.parent.parent.parent)
    change_store(toy, lambda store: store.fill(0))
    with pytest.raises(UserError, match=r"toy/64/1\.0\.0: 1 problem \(pixels/train\.npy: .*delete .*pixels, which"):
        command.verify(name="toy", resolution=R, data_dir=data_dir)
    assert "pixel stores: pixels/train.npy is not whole, pixels/validation.npy is whole" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--name=no --resolution=64: no such .*--name=toy --resolution=64\."):
        command.verify(name="no", resolution=R, data_dir=data_dir)


def test_command(toy, tmp_path):
    flags = [
        "verify",
        "--name=toy",
        f"--resolution={R}",
        f"--data_dir={tmp_path / 'data'}",
        f"--output={tmp_path / 'out'}",
    ]
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
