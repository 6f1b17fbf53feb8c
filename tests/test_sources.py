"""A .zip file gives the dataset of its folder; members that are dangerous or damaged are refused or reported."""

import dataclasses
import os
import pathlib
import random
import re
import shutil
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts.celeba import celeba_layout
from facevae_jax.data.layouts.ffhq import ffhq_layout
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.prepared import builder
from facevae_jax.data.sources.images import convert
from facevae_jax.data.sources.opening import ZipMember, list_files, open_source
from tests.test_conversion import content, write_images
from tests.test_images import SQUARE, encoded
from tests.test_layouts import celeba_tree, face, write_json


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)), "PNG")


def archive(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return path


def pack(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Packs a folder, itself included, in an order that is not that of the names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    random.Random(0).shuffle(files)
    return archive(path, [(file.relative_to(folder.parent).as_posix(), file.read_bytes()) for file in files])


def test_an_archive_gives_the_dataset_of_its_folder(tmp_path):
    folder = tmp_path / "faces"
    write_images(folder / "0", 10)
    write_images(folder / "1", 48, bad=True)
    (folder / "notes.txt").write_text("")
    results = []
    for number, source in enumerate((folder, pack(folder, tmp_path / "faces.zip"))):
        layout = folder_layout(source)
        assert "1 other files were ignored (1 .txt)" in layout.notes[0]
        layout = dataclasses.replace(layout, source="faces")  # the metadata holds the name of the source
        options = {"name": "toy", "resolution": 32, "workers": 2, "on_bad_image": "skip"}
        results.append(builder.prepare_dataset(layout, data_dir=tmp_path / str(number), **options))
    assert [result.bad for result in results] == [2, 2]
    assert content(results[0].directory) == content(results[1].directory)


def test_ffhq_and_celeba_in_archives(tmp_path):
    faces = celeba_tree(tmp_path / "CelebA")
    expected, found = celeba_layout(faces).splits, celeba_layout(pack(faces, tmp_path / "celeba.zip")).splits
    for split in expected:
        assert [image[::2] for image in found[split]] == [image[::2] for image in expected[split]]
    assert convert(found["train"][0].file, SQUARE) == convert(expected["train"][0].file, SQUARE)
    thumbnails = tmp_path / "ffhq" / "thumbnails128x128" / "00000"
    thumbnails.mkdir(parents=True)
    (thumbnails / "00011.png").write_bytes(png(0))
    write_json(tmp_path / "ffhq" / "ffhq-features-dataset" / "json" / "00011.json", face(age=21))
    (image,) = ffhq_layout(pack(tmp_path / "ffhq", tmp_path / "ffhq.zip"), resolution=64).splits["train"]
    assert (image.name, image.attributes[0]) == ("thumbnails128x128/00000/00011.png", 21)


def test_celeba_whose_images_are_still_zipped(tmp_path):
    faces = celeba_tree(tmp_path / "celeba")
    expected = [image.name for images in celeba_layout(faces).splits.values() for image in images]
    pack(faces / "img_align_celeba", faces / "img_align_celeba.zip")
    shutil.rmtree(faces / "img_align_celeba")
    layout = celeba_layout(faces)
    assert [image.name for images in layout.splits.values() for image in images] == expected
    assert isinstance(layout.splits["train"][0].file, ZipMember)


@pytest.mark.parametrize(
    "name", ["../up.png", "a/../../up.png", "/root.png", "..\\up.png", "C:\\up.png", "\\up.png", ".."]
)
def test_members_outside_of_the_archive_are_refused_by_name(tmp_path, name):
    path = archive(tmp_path / "a.zip", [("good.png", png(0)), (name, png(1))])
    with pytest.raises(UserError, match=re.escape(ascii(name)[1:-1])) as caught:
        folder_layout(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a..png", "..a.png", "x/..b/c.png", "./x/./a.png"])
def test_dots_in_names_are_harmless(tmp_path, name):
    path = archive(tmp_path / "a.zip", [("b.png", png(0)), (name, png(1))])
    listing = list_files(open_source(path))
    assert len(listing.names) == 2
    assert not [name for name in listing.names if name.startswith("./")]
    assert {listing.file(row).read() for row in (0, 1)} == {png(0), png(1)}


def test_of_members_with_one_name_the_last_counts(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(
            tmp_path / "a.zip", [("a.png", png(0)), ("./a.png", png(1)), ("a.png", png(2)), ("b.png", png(3))]
        )
    layout = folder_layout(path)
    assert "2 files" in layout.notes[0]
    images = {image.name: image for images in layout.splits.values() for image in images}
    assert set(images) == {"a.png", "b.png"}
    assert images["a.png"].file.read() == png(2)


def test_links_bombs_and_damage_in_archives_are_bad_images(tmp_path):
    path = archive(tmp_path / "a.zip", [("flipped.png", png(0)), ("large.png", png(1))])
    with zipfile.ZipFile(path, "a") as opened:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "/etc/passwd")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"large.png"))
    data[at + 24 : at + 28] = struct.pack("<I", 2**31)  # the size that it claims
    path.write_bytes(data)
    listing = list_files(open_source(path))
    reasons = {name: convert(listing.file(row), SQUARE).failure for row, name in enumerate(listing.names)}
    assert set(reasons) == {"flipped.png", "large.png", "link.png"}
    assert "link" in reasons["link.png"]
    assert "Bad CRC-32" in reasons["flipped.png"] or "decompressing" in reasons["flipped.png"]
    assert "2147483648 bytes" in reasons["large.png"]


def test_an_archive_that_is_cut_cannot_be_read(tmp_path):
    path = archive(tmp_path / "a.zip", [(f"{i}.png", png(i)) for i in range(5)])
    os.truncate(path, path.stat().st_size // 3)
    with pytest.raises(UserError, match=f"source='{path}' cannot be read") as caught:
        folder_layout(path)
    assert "\n" not in str(caught.value)
