"""Files as people have them: archives of other systems, odd tables, damaged metadata, color profiles, Parquet."""

import io
import json
import os
import pathlib
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts.celeba import celeba_layout
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.layouts.types import Attribute
from facevae_jax.data.sources import images
from facevae_jax.data.sources.opening import open_source
from facevae_jax.prepare import open_layout

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)


def png(pixels=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # `ZipInfo` would replace some characters
            archive.writestr(info, data)
    return path


class OfFinder(zipfile.ZipInfo):
    """Writes a name in UTF-8 without the bit that says so, as macOS does."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(), self.flag_bits & ~0x800


def finders(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(OfFinder(name), png())
    return path


def splits(layout):
    return {split: [image.name for image in found] for split, found in layout.splits.items()}


def saved(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return folder


NAMES = [f"Zo\u00eb_{number}.png" for number in range(20)]


@pytest.fixture
def plain(tmp_path):
    return splits(folder_layout(saved(tmp_path / "plain", NAMES)))


@pytest.mark.parametrize(
    "kind",
    [
        "mac",
        "finder",
        "windows",
        "decomposed",
        "decomposed folder",
        "linked",
        "bom",
        "wrapped",
        "network drive",
        "loop",
    ],
)
def test_a_split_depends_on_no_system_that_packed_the_files(plain, tmp_path, kind):
    decomposed = [unicodedata.normalize("NFD", name) for name in NAMES]
    if kind == "mac":
        files = {f"faces/{name}": png() for name in NAMES} | {f"__MACOSX/faces/._{name}": b"x" for name in NAMES}
        source = zipped(tmp_path / "mac.zip", files | {"faces/.DS_Store": b"x"})
    elif kind == "windows":
        source = zipped(tmp_path / "w.zip", {f"faces\\{name}": png() for name in NAMES})
    elif kind == "decomposed":
        source = zipped(tmp_path / "d.zip", {name: png() for name in decomposed})
    elif kind == "decomposed folder":
        source = saved(tmp_path / "decomposed", decomposed)
    elif kind == "finder":  # UTF-8 that does not say so
        source = finders(tmp_path / "f.zip", [f"faces/{name}" for name in decomposed])
    elif kind == "wrapped":
        source = saved(tmp_path / "wrapped", [f"a/b/{name}" for name in NAMES]) / "."
        (source / "a" / ".DS_Store").touch()
    elif kind == "network drive":
        source = saved(tmp_path / "drive", [*NAMES, *(f"@eaDir/{name}/THUMB.png" for name in NAMES)])
        saved(source / "$RECYCLE.BIN", ["x.png"])
    elif kind == "loop":
        source = saved(tmp_path / "loop", NAMES)
        (source / "loop").symlink_to("loop")
        (source / "gone").symlink_to("nowhere")
    elif kind == "bom":
        source = zipped(tmp_path / "b.zip", {f"\ufeff{name}": png() for name in NAMES})
    else:
        source = saved(tmp_path / "linked", NAMES)
        (source / "0").symlink_to(source)
    layout = folder_layout(source)
    assert splits(layout) == plain
    for found in layout.splits.values():
        assert all(images.convert(image.file, images.Task(images.CENTER_SQUARE, 32)).png for image in found)


def test_a_linked_folder_has_its_own_name_in_whatever_order_folders_are_listed(tmp_path, monkeypatch):
    saved(tmp_path, ["b/1.png", "b/c/2.png"])
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "z").symlink_to(tmp_path / "b" / "c")
    scandir, expected = os.scandir, ["b/1.png", "b/c/2.png"]
    for order in (False, True):
        monkeypatch.setattr(os, "scandir", lambda path, order=order: sorted(scandir(path), key=str, reverse=order))
        assert open_source(tmp_path).names() == expected


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [(8, 1, "encrypted: unpack"), (10, 9, "Deflate64: unpack"), (10, 93, "Zstandard: unpack")],
)
def test_archives_that_cannot_be_read_say_so_once(tmp_path, offset, value, expected):
    data = bytearray(zipped(tmp_path / "a.zip", {"a.png": png(), "b.png": png()}).read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:  # the entries of the directory
        data[at + offset] = value
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=expected) as caught:
        open_source(tmp_path / "a.zip")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"\xff\xd8\xff\xe0", "one JPEG image: give the folder"),
        (b'{"a": 1}', "a JSON file"),
        (b"7z\xbc\xaf\x27\x1c rest", "7z"),
        (b"Rar!\x1a\x07", "RAR"),
        (b"\n<!DOCTYPE html><title>Quota exceeded", "a page of a web site"),
        (b"<html>", "a page of a web site"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1", "Parquet"),
        (b"PK\x03\x04 broken off", "missing"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"", "empty"),
    ],
)
def test_what_is_no_zip_file_is_named(tmp_path, start, expected):
    (tmp_path / "faces.zip").write_bytes(start)
    with pytest.raises(UserError, match=expected):
        open_source(tmp_path / "faces.zip")


def test_folders_for_splits_are_kept(tmp_path):
    both = folder_layout(saved(tmp_path / "1", ["train/a.png", "Valid/b.png", "test/x/c.png"]))
    assert splits(both) == {"train": ["train/a.png"], "validation": ["Valid/b.png"], "test": ["test/x/c.png"]}
    assert "kept as splits" in both.notes[0]
    two = folder_layout(saved(tmp_path / "2", [f"training/{n}.png" for n in range(9)] + ["testing/t.png"]))
    assert splits(two)["test"] == ["testing/t.png"]
    assert len(splits(two)["validation"]) >= 1
    mixed = folder_layout(saved(tmp_path / "3", ["train/a.png", "val/b.png", "c.png"]))
    assert "test" not in splits(mixed)
    assert "no splits, since 1 images are outside" in mixed.notes[0]
    deeper = folder_layout(saved(tmp_path / "4", ["images/train/a.png", "images/val/b.png", "images/eval_set/c.png"]))
    assert splits(deeper)["validation"] == ["eval_set/c.png", "val/b.png"]
    below = folder_layout(
        saved(tmp_path / "5", [f"{c}/{s}/{c}.png" for c in ("men", "women") for s in ("train", "test")])
    )
    assert splits(below)["test"] == ["men/test/men.png", "women/test/women.png"]
    assert below.attributes == (Attribute("class", "categorical", ("men", "women")),)
    people = folder_layout(saved(tmp_path / "6", ["Val_Kilmer/0.png", "Test Person/0.png", "Ann/0.png"]))
    assert people.attributes == (Attribute("class", "categorical", ("Ann", "Test Person", "Val_Kilmer")),)
    alone = folder_layout(saved(tmp_path / "7", ["val/a.png", "test/b.png"]))
    assert set(splits(alone)) == {"train", "validation"}
    assert "none is for training" in alone.notes[0]


@pytest.mark.parametrize("packed", [False, True])
def test_folders_for_classes_are_a_label_beside_those_for_splits(tmp_path, packed):
    source = tmp_path / "faces"
    for place in ("train/women", "train/men", "val/men"):
        for number in range(2):
            save(source / place / f"{number}.png")
    if packed:
        source = pathlib.Path(shutil.make_archive(str(source), "zip", source))
    layout = folder_layout(source)
    assert layout.attributes == (Attribute("class", "categorical", ("men", "women")),)
    found = {image.name: image.attributes for images in layout.splits.values() for image in images}
    assert found == {
        f"{place}/{n}.png": (float("women" in place),)
        for place in ("train/women", "train/men", "val/men")
        for n in range(2)
    }


@pytest.mark.parametrize("places", [("00000", "00001"), ("a", "a/b"), ("a", ""), ("a",), ("train", "val")])
def test_other_folders_are_no_classes(tmp_path, places):
    for place in places:
        save(tmp_path / place / "0.png")
    assert folder_layout(tmp_path).attributes == ()


@pytest.mark.parametrize("packed", [False, True])
def test_stylegan_datasets_bring_their_labels(tmp_path, packed):
    source = tmp_path / "faces"
    for number in range(4):
        save(source / f"0000{number % 2}" / f"img{number}.png")
    labels = [[f"0000{number % 2}/img{number}.png", number % 2] for number in range(4)]
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    given = pathlib.Path(shutil.make_archive(str(source), "zip", source)) if packed else source
    layout = folder_layout(given)
    assert layout.attributes == (Attribute("label", "binary"),)
    found = {image.name: image.attributes for images in layout.splits.values() for image in images}
    assert found == {name: (float(label),) for name, label in labels}
    assert folder_layout(given, labeled=True).attributes == ()


@pytest.mark.parametrize("content", ['{"labels": null}', '{"labels": [["other.png", 1]]}', '"labels"', "", "[]"])
def test_a_dataset_json_without_labels_costs_nothing_but_a_note(tmp_path, content):
    save(tmp_path / "0.png")
    (tmp_path / "dataset.json").write_text(content)
    layout = folder_layout(tmp_path)
    assert layout.attributes == ()
    found = [note for note in layout.notes if "dataset.json are left out" in note]
    assert len(found) == ("labels" in content)
    assert "\n" not in "".join(found)


@pytest.mark.parametrize("damage", ["folder", "member"])
def test_a_dataset_json_that_cannot_be_read_costs_no_image(tmp_path, damage):
    source = tmp_path / "faces"
    save(source / "0.png")
    if damage == "folder":
        (source / "dataset.json").mkdir()
    else:
        text = json.dumps({"labels": [["0.png", 1]]})
        zipped(tmp_path / "faces.zip", {"0.png": png(), "dataset.json": text.encode()})
        data = (tmp_path / "faces.zip").read_bytes()
        assert data.count(text.encode()) == 1  # stored, not compressed
        (tmp_path / "faces.zip").write_bytes(data.replace(text.encode(), text.encode().replace(b"1", b"2")))
        source = tmp_path / "faces.zip"
    layout = folder_layout(source)
    assert len(layout.splits["train"]) == 1
    assert layout.attributes == ()


def test_a_table_of_ones_own_replaces_what_folders_say(tmp_path):
    for place in ("women", "men"):
        save(tmp_path / place / f"{place}.png")
    (tmp_path / "labels.csv").write_text("file,class\nwomen.png,0\nmen.png,1\n")
    layout = open_layout("folder", str(tmp_path), resolution=32, attributes=str(tmp_path / "labels.csv"))
    assert layout.attributes == (Attribute("class", "binary"),)


def test_celeba_as_png_and_as_torchvision_keeps_it(tmp_path):
    root = tmp_path / "root" / "celeba"
    for number in (1, 2):
        saved(root, [f"img_align_celeba/{number:06d}.png"])
    (root / "list_attr_celeba.txt").write_text("2\nSmiling Male\n000001.jpg 1 -1\n000002.jpg -1 1\n")
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 1\n")
    for source in (root, root.parent):
        layout = celeba_layout(source)
        assert [layout.splits[split][0].attributes for split in ("train", "validation")] == [(1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("files", "layout", "remedy"),
    [
        (["faces.zip"], "folder", r"give the archive itself, source=.*/faces\.zip"),
        (["a.7z.001", "a.7z.002"], "celeba", r"unpack a\.7z\.001, a\.7z\.002 first"),
        (["x/train.parquet"], "folder", "take layout=parquet"),
        (["a.heic", "b.HEIC"], "folder", "convert a.heic, b.HEIC to JPEG"),
        (["notes.txt"], "folder", "give the folder or the .zip file"),
        (["data/img_align_celeba/1.jpg", "notes.txt"], "celeba", "--layout=celeba --source=.*/data "),
        (["a/1.txt", "b/2.txt"], "celeba", "try python -m facevae_jax.prepare --layout=folder"),
    ],
)
def test_the_remedy_is_not_the_command_that_failed(tmp_path, files, layout, remedy):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=remedy):
        {"folder": folder_layout, "celeba": celeba_layout}[layout](tmp_path)
