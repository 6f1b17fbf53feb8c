import contextlib
import io
import os
import pathlib
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from facevae_jax.data import archives, builder, celeba_layout, ffhq_layout, layouts
from facevae_jax.data.images import Task, convert
from facevae_jax.data.sources import open_source
from facevae_jax.errors import UserError
from tests.test_conversion import content
from tests.test_layouts import celeba, face, write_json

TASK = Task(layouts.CENTRE_SQUARE, 32)


ESCAPES = ["../up.png", "a/../../up.png", "/root.png", "..\\up.png", "C:\\up.png", "\\up.png", ".."]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def archive(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, data in members:
                opened.writestr(name, data)
    else:
        with tarfile.open(path, "w") as opened:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    return path


def pack(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Packs a folder, itself included, in an order that is not that of the names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    random.Random(0).shuffle(files)
    return archive(path, [(file.relative_to(folder.parent).as_posix(), file.read_bytes()) for file in files])


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_gives_the_dataset_of_its_folder(tmp_path, suffix):
    folder = tmp_path / "faces"
    for i in range(30):
        path = folder / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (folder / "1" / "bad.png").write_bytes(png(0)[:200])
    (folder / "notes.txt").write_text("")
    packed = pack(folder, tmp_path / f"faces{suffix}")
    results = []
    for number, source in enumerate((folder, packed)):
        layout = layouts.folder(source)
        assert "1 other files were ignored (1 .txt)" in layout.notes[0]
        layout = layouts.dataclasses.replace(layout, source="faces")  # the provenance tells the names apart
        options = {"name": "toy", "resolution": 32, "workers": 2, "on_bad_image": "skip"}
        results.append(builder.prepare_dataset(layout, data_dir=tmp_path / str(number), **options))
    assert [result.bad for result in results] == [1, 1]
    assert content(results[0].directory) == content(results[1].directory)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_ffhq_and_celeba_in_archives(tmp_path, suffix):
    faces = celeba(tmp_path / "CelebA")
    expected = celeba_layout.celeba(faces)
    found = celeba_layout.celeba(pack(faces, tmp_path / f"celeba{suffix}"))
    assert {split: [image[::2] for image in images] for split, images in found.splits.items()} == {
        split: [image[::2] for image in images] for split, images in expected.splits.items()
    }
    assert [convert(i.file, TASK) for i in found.splits["train"]] == [
        convert(i.file, TASK) for i in expected.splits["train"]
    ]
    ffhq = tmp_path / "ffhq" / "thumbnails128x128" / "00000"
    ffhq.mkdir(parents=True)
    (ffhq / "00011.png").write_bytes(png(0))
    write_json(tmp_path / "ffhq" / "ffhq-features-dataset" / "json" / "00011.json", face(age=21))
    layout = ffhq_layout.ffhq(pack(tmp_path / "ffhq", tmp_path / f"ffhq{suffix}"), resolution=64)
    (image,) = layout.splits["train"]
    assert (image.name, image.attributes[0]) == ("thumbnails128x128/00000/00011.png", 21)


def test_celeba_whose_images_are_still_zipped(tmp_path):
    faces = celeba(tmp_path / "celeba")
    expected = [image.name for images in celeba_layout.celeba(faces).splits.values() for image in images]
    pack(faces / "img_align_celeba", faces / "img_align_celeba.zip")
    for path in (faces / "img_align_celeba").iterdir():
        path.unlink()
    (faces / "img_align_celeba").rmdir()
    layout = celeba_layout.celeba(faces)
    assert [image.name for images in layout.splits.values() for image in images] == expected
    assert isinstance(layout.splits["train"][0].file, archives.ZipMember)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../up.png", "a/../../up.png", "/root.png", "..\\up.png", "C:\\up.png", "\\up.png", ".."]
)
def test_members_that_lead_out_are_refused_by_name(tmp_path, suffix, name):
    path = archive(tmp_path / f"a{suffix}", [("good.png", png(0)), (name, png(1))])
    with pytest.raises(UserError, match="leads out of the archive: nothing was read") as caught:
        layouts.folder(path)
    assert ascii(name)[1:-1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a..png", "..a.png", "x/..b/c.png", "./x/./a.png"])
def test_dots_in_names_lead_nowhere(tmp_path, name):
    path = archive(tmp_path / "a.zip", [("b.png", png(0)), (name, png(1))])
    listing = open_source(path).files()
    assert len(listing.names) == 2
    assert [name for name in listing.names if name.startswith("./")] == []


def test_of_members_with_one_name_the_last_counts(tmp_path):
    for suffix in (".zip", ".tar"):
        path = tmp_path / f"a{suffix}"
        with pytest.warns(UserWarning, match="Duplicate name") if suffix == ".zip" else contextlib.nullcontext():
            archive(path, [("a.png", png(0)), ("./a.png", png(1)), ("a.png", png(2)), ("b.png", png(3))])
        layout = layouts.folder(path)
        assert "2 files are in a.* more than once: the last" in layout.notes[0].replace(suffix, ".*")
        images = {image.name: image for images in layout.splits.values() for image in images}
        assert set(images) == {"a.png", "b.png"}
        assert images["a.png"].file.read() == png(2)


def test_links_bombs_and_damage_in_archives_are_bad_images(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as opened:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        opened.addfile(pipe)
    reasons = {}
    listing = open_source(path).files()
    reasons |= {name: convert(listing.file(row), TASK).failure for row, name in enumerate(listing.names)}
    zipped = archive(tmp_path / "a.zip", [("flipped.png", png(0)), ("large.png", png(1))])
    with zipfile.ZipFile(zipped, "a") as opened:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "/etc/passwd")
    data = bytearray(zipped.read_bytes())
    data[500] ^= 1
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"large.png"))
    data[at + 24 : at + 28] = struct.pack("<I", 2**31)  # the size that it claims
    zipped.write_bytes(data)
    listing = open_source(zipped).files()
    reasons |= {name: convert(listing.file(row), TASK).failure for row, name in enumerate(listing.names)}
    assert set(reasons) == {"hard.png", "soft.png", "flipped.png", "large.png", "link.png"}
    for name in ("hard.png", "soft.png", "link.png"):
        assert "inside an archive: put the file itself in" in reasons[name]
    assert "Bad CRC-32" in reasons["flipped.png"] or "decompressing" in reasons["flipped.png"]
    assert "2147483648 bytes are over" in reasons["large.png"]


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "layout", [layouts.folder, celeba_layout.celeba, lambda path: ffhq_layout.ffhq(path, resolution=64)]
)
def test_an_empty_archive(tmp_path, suffix, layout):
    with pytest.raises(UserError, match=r"expected .*, found: nothing \(0 entries\)"):
        layout(archive(tmp_path / f"a{suffix}", []))


@pytest.mark.parametrize("damage", ["cut", "compressed", "text"])
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_that_cannot_be_read(tmp_path, suffix, damage):
    path = archive(tmp_path / f"a{suffix}", [(f"{i}.png", png(i)) for i in range(5)])
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 3)
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as opened:
            opened.add(__file__)
    else:
        path.write_text("not an archive")
    with pytest.raises(
        UserError, match=r"cannot be read .*: give a folder, a \.zip or an uncompressed \.tar"
    ) as caught:
        layouts.folder(path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_a_bad_image_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        assert convert(tmp_path / name, TASK).failure == "not a regular file"


def test_ignored_files_are_counted_by_kind(tmp_path):
    for name in ("a.png", ".b.png", "c.gif", "d.gif", "x/.hidden/e.png", "README", "._a.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(0))
    (note,) = layouts.folder(tmp_path).notes
    assert note.startswith("6 other files were ignored (3 .png, 2 .gif, 1 no extension): images are .png")
