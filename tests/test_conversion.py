"""Preparation that is stopped goes on to the same bytes, and every image is either in the dataset or reported."""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facevae_jax.data import builder, conversion, dataset, images, layouts
from facevae_jax.errors import UserError
from tests.conftest import assert_one_line_error

RESOLUTION = 32
PER_SHARD = 10
REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * PER_SHARD)


def write_images(folder: pathlib.Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:04d}.png")


def prepare(source: pathlib.Path, data_dir: pathlib.Path, **options) -> builder.Prepared:
    layout = layouts.folder(source)
    return builder.prepare_dataset(
        layout, data_dir=data_dir, name="toy", resolution=RESOLUTION, **{"workers": 2} | options
    )


def content(directory: pathlib.Path) -> dict[str, str]:
    """Every file's name and the hash of its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """100 images, two of them bad: ten or so shards."""
    folder = tmp_path_factory.mktemp("source") / "faces"
    write_images(folder, 100)
    (folder / "0033.png").write_bytes(b"not an image")
    (folder / "0077.png").write_bytes((folder / "0077.png").read_bytes()[:1000])
    return folder


@pytest.fixture
def expected(source, tmp_path) -> dict[str, str]:
    return content(prepare(source, tmp_path / "expected", on_bad_image="skip").directory)


@pytest.fixture
def converted(monkeypatch) -> list[pathlib.Path]:
    """The files that are decoded, in the order in which this begins."""
    files, convert = [], images.convert

    def record(file, task):
        files.append(file)
        return convert(file, task)

    monkeypatch.setattr(images, "convert", record)
    return files


@pytest.mark.parametrize("images_before", [0, 9, 10, 45, 99])
def test_a_pass_that_is_stopped_is_gone_on_with(source, expected, tmp_path, monkeypatch, converted, images_before):
    converting = images.converting

    @contextlib.contextmanager
    def stopping(files, task, *, threads):
        def some(stream):
            yield from itertools.islice(stream, images_before)
            raise KeyboardInterrupt

        with converting(files, task, threads=threads) as stream:
            yield some(stream)

    with monkeypatch.context() as patch:
        patch.setattr(images, "converting", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", on_bad_image="skip")
    with pytest.raises(UserError, match="no dataset is prepared there"):
        dataset.find_dataset(tmp_path / "out", name="toy", resolution=RESOLUTION)
    converted.clear()
    result = prepare(source, tmp_path / "out", on_bad_image="skip")
    assert content(result.directory) == expected
    sizes = [len(shard.members) for shard in conversion.plan_shards(layouts.folder(source), resolution=RESOLUTION)]
    kept = max(end for end in itertools.accumulate(sizes, initial=0) if end <= images_before)
    assert len(converted) == 100 - kept
    assert kept - 2 <= result.taken_over <= kept
    assert [path.name for path in result.directory.parent.iterdir()] == [result.directory.name]


def test_nothing_is_imported_beside_the_threads(source, tmp_path):
    """TFDS replaces `__import__` while it is imported, so that images failed whose decoder was imported meanwhile."""
    code = (
        "import builtins, pathlib, sys; from facevae_jax.data import builder, images, layouts\n"
        "convert, usual, seen = images.convert, builtins.__import__, []\n"
        "def check(file, task):\n"
        "    seen.append('tensorflow_datasets' in sys.modules and builtins.__import__ is usual)\n"
        "    return convert(file, task)\n"
        "images.convert = check\n"
        f"layout = layouts.folder(pathlib.Path({str(source)!r}))\n"
        f"builder.prepare_dataset(layout, data_dir={str(tmp_path)!r}, name='toy', resolution={RESOLUTION}, workers=2, "
        "on_bad_image='skip')\n"
        "print(all(seen), len(seen))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "True 100\n"


def stopped(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Converts everything, but does not publish it, because of the bad images; the folder of what was done."""
    with pytest.raises(UserError, match="2 of 100 images cannot be used"):
        prepare(source, data_dir)
    return data_dir / "toy" / str(RESOLUTION) / builder.INCOMPLETE


def test_another_policy_takes_over_what_is_done(source, expected, tmp_path, converted):
    incomplete = stopped(source, tmp_path)
    listed = [json.loads(line) for line in (incomplete / builder.BAD_IMAGES).read_text().splitlines()]
    assert [entry["path"] for entry in listed] == ["0033.png", "0077.png"]
    converted.clear()
    result = prepare(source, tmp_path, on_bad_image="skip")
    assert content(result.directory) == expected
    assert (sum(result.images.values()), result.bad, result.taken_over) == (98, 2, 98)
    assert converted == []


@pytest.mark.parametrize("damage", ["cut", "flip", "note", "source"])
def test_damaged_and_outdated_shards_are_converted_anew(source, expected, tmp_path, converted, damage):
    incomplete = stopped(source, tmp_path)
    shard = next(incomplete.glob("1.0.0/*train.array_record-00002-of-*"))
    first = layouts.folder(source).splits["train"][2 * PER_SHARD].file
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "note":
        next(incomplete.rglob("*train.array_record-00002-of-*.json")).write_text('{"fingerprint": ')
    else:
        os.utime(first, (1, 1))
    converted.clear()
    assert content(prepare(source, tmp_path, on_bad_image="skip").directory) == expected
    assert first in converted
    assert len(converted) == PER_SHARD


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(source, expected, tmp_path, kills):
    """Each kill comes at a random moment of a process that converts slowly; one that ends first begins a new trial."""
    code = (
        "import time, pathlib; from facevae_jax.data import builder, conversion, images, layouts, records\n"
        f"conversion.SHARD_BYTES = {conversion.SHARD_BYTES}; convert = images.convert\n"
        "images.convert = lambda file, task: (time.sleep(0.02), convert(file, task))[1]\n"
        f"layout = layouts.folder(pathlib.Path({str(source)!r})); records.import_tfds()\n"
        "print('ready', flush=True)\n"
        f"builder.prepare_dataset(layout, data_dir={str(tmp_path / 'out')!r}, name='toy', resolution={RESOLUTION}, "
        "workers=2, on_bad_image='skip')"
    )
    published = dataset.dataset_directory(tmp_path / "out", name="toy", resolution=RESOLUTION)
    randomness, killed = random.Random(0), 0
    while killed < kills:
        with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(randomness.uniform(0.0, 1.2))  # converting takes one second
            process.kill()
        if process.returncode == 0:
            assert content(published) == expected
            shutil.rmtree(published)
        killed += process.returncode == -signal.SIGKILL
    result = prepare(source, tmp_path / "out", on_bad_image="skip")
    assert content(result.directory) == expected
    assert [path.name for path in published.parent.iterdir()] == [published.name]


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_while_the_new_dataset_takes_the_place_of_the_old(source, expected, tmp_path, monkeypatch, replaced):
    target = prepare(source, tmp_path, on_bad_image="skip").directory
    rename = pathlib.Path.rename

    def stop(path, new):
        if path.name != target.name or new != target or replaced:
            rename(path, new)
        if new == target:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path, on_bad_image="skip")
    assert target.exists() == replaced
    assert content(prepare(source, tmp_path, on_bad_image="skip").directory) == expected
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def run_with_small_disk(tmp_path, command: str) -> subprocess.CompletedProcess:
    """Runs a shell command with `tmp_path/disk` of 2 MB, in a mount namespace of its own; skips where it may not."""
    (tmp_path / "disk").mkdir()
    script = f"mount -t tmpfs -o size=2m tmpfs {tmp_path}/disk && touch {tmp_path}/mounted && {command}"
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if not (tmp_path / "mounted").exists():
        pytest.skip("this system does not let its users mount a small disk")
    return result


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_full_and_a_read_only_disk(tmp_path, fault):
    source = tmp_path / "faces"
    source.mkdir()
    for i in range(40):  # 3 MB of noise at 160 pixels, 6 MB as PNG of 256
        noise = np.random.default_rng(i).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(noise).save(source / f"{i}.png")
    prepare = f"{sys.executable} -m facevae_jax.prepare --layout=folder --source={source} --resolution=256"
    if fault == "full":
        rest = f"; code=$?; ls -R {tmp_path}/disk/folder; exit $code"
    else:
        prepare, rest = f"mount -o remount,ro {tmp_path}/disk && {prepare}", ""
    result = run_with_small_disk(tmp_path, f"{prepare} --data_dir={tmp_path}/disk{rest}")
    assert_one_line_error(result, f"{tmp_path}/disk", "No space left" if fault == "full" else "Read-only file system")
    assert "dataset_info.json" not in result.stdout


def test_a_folder_that_vanishes_in_the_middle(source, tmp_path, monkeypatch):
    convert, left = images.convert, [40]

    def remove_then_convert(file, task):
        left[0] -= 1
        if not left[0]:
            shutil.rmtree(tmp_path / "out" / "toy")
        return convert(file, task)

    monkeypatch.setattr(images, "convert", remove_then_convert)
    with pytest.raises(UserError, match=r"--data_dir=.*cannot be written .*run the same command again") as caught:
        prepare(source, tmp_path / "out", workers=1, on_bad_image="skip")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("dataset_info.json"))


def test_a_source_that_vanishes_in_the_middle(source, tmp_path, monkeypatch):
    copy = tmp_path / "faces"
    shutil.copytree(source, copy)
    convert, left = images.convert, [40]

    def remove_then_convert(file, task):
        left[0] -= 1
        if not left[0]:
            shutil.rmtree(copy)
        return convert(file, task)

    monkeypatch.setattr(images, "convert", remove_then_convert)
    with pytest.raises(UserError, match=r"\d+ of 100 images cannot be used .*No such file or directory"):
        prepare(copy, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").rglob("dataset_info.json"))


def test_two_at_once_are_refused(source, tmp_path):
    folder = tmp_path / "toy" / str(RESOLUTION) / builder.INCOMPLETE
    folder.mkdir(parents=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this dataset"):
            prepare(source, tmp_path)


def test_splits_and_shards_of_bad_images_alone(tmp_path):
    write_images(tmp_path / "faces", 40)
    layout = layouts.folder(tmp_path / "faces")
    for image in (*layout.splits["validation"], *layout.splits["train"][PER_SHARD : 2 * PER_SHARD]):
        image.file.write_bytes(b"")
    result = prepare(tmp_path / "faces", tmp_path, on_bad_image="skip")
    trained = len(layout.splits["train"]) - PER_SHARD
    assert result.images == dataset.split_sizes(result.directory) == {"train": trained}
    assert len(list(dataset.read_images(result.directory, "train"))) == trained
    assert result.bad == 40 - trained
    for image in layout.splits["train"]:
        image.file.write_bytes(b"")
    with pytest.raises(UserError, match="40 of 40 images cannot be used"):
        prepare(tmp_path / "faces", tmp_path, on_bad_image="skip")
    assert dataset.split_sizes(result.directory) == {"train": trained}  # the old one is still there


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    """By kind, files that are unusual and good: each is a flat (10, 200, 30) picture, or grey where it must be."""
    colour = Image.new("RGB", (40, 40), (10, 200, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG", quality=100),
        "grey.png": encoded(Image.new("L", (40, 40), 99), "PNG"),
        "grey16.png": encoded(Image.new("I;16", (40, 40), 99 * 257), "PNG"),
        "palette.png": encoded(colour.quantize(4), "PNG"),
        "alpha.png": encoded(colour.convert("RGBA"), "PNG"),
        "bits.png": encoded(Image.new("1", (40, 40), 1), "PNG"),
        "rotated.jpg": encoded(colour, "JPEG", exif=exif),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True),
        "moving.webp": encoded(
            colour, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 40))], lossless=True
        ),
        "wrong_extension.jpg": encoded(colour, "PNG"),
        "phone.jpg": encoded(colour, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        "moving.png": encoded(colour, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        "copy.png": encoded(colour.convert("RGBA"), "PNG"),  # the bytes of alpha.png
        "line\nbreak.png": encoded(colour, "PNG"),
        "bytes\udcff.png": encoded(colour, "PNG"),
        "thin.png": encoded(colour.resize((9, 400)), "PNG"),
    }


def bad_images() -> dict[str, bytes]:
    """By kind, files that are no pictures, or damaged ones."""
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), "PNG")
    jpeg = encoded(Image.open(io.BytesIO(good)), "JPEG")
    return {
        "empty.png": b"",
        "text.jpg": b"hello",
        "html.png": b"<!doctype html><title>404</title>",
        "gif.png": encoded(Image.new("RGB", (40, 40)), "GIF"),
        "tiny.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "bomb.png": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "cut.png": good[:-200],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "header.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        "flipped.png": good[:300] + bytes([good[300] ^ 1]) + good[301:],
    }


def test_a_zoo_of_files(tmp_path):
    """Each file is converted right or reported with its reason: images in = images out + reported."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    odd, bad = odd_images(), bad_images()
    generator = np.random.default_rng(0)
    for name, data in (odd | bad).items():
        (folder / name).write_bytes(data)
    good = odd["alpha.png"]
    for i in range(1000):  # any byte of a good file changed, or any number of them missing, or in front
        position = int(generator.integers(len(good)))
        change = bytes([good[position] ^ int(generator.integers(1, 256))])
        mutant = (good[:position] + change + good[position + 1 :], good[:position], good[position:])[i % 3]
        (folder / f"mutant{i:04d}.png").write_bytes(mutant)
    (folder / "broken_link.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "._alpha.png").write_bytes(b"AppleDouble")
    (folder / "folder.png").mkdir()
    result = prepare(folder, tmp_path, on_bad_image="skip")
    reported = [json.loads(line) for line in (result.directory / builder.BAD_IMAGES).read_text().splitlines()]
    names = {entry["path"] for entry in reported}
    assert len(reported) == result.bad == len(names)
    assert sum(result.images.values()) + len(names) == len(odd) + len(bad) + 1000 + 2
    assert names >= {*bad, "broken_link.png", "pipe.png"}
    assert not names & {*odd}
    assert all(entry["reason"] and "0x" not in entry["reason"] for entry in reported)
    rows = {split: list(dataset.read_images(result.directory, split)) for split in result.images}
    layout = layouts.folder(folder)
    for split, members in layout.splits.items():
        kept = [image.name for image in members if image.name not in names]
        for name, pixels in zip(kept, rows[split], strict=True):
            expected = {"grey.png": 99, "grey16.png": 99, "bits.png": 255}.get(name, (10, 200, 30))
            if name in odd:
                assert np.abs(pixels.astype(int) - expected).max() <= 3, name


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8))))
def test_whatever_the_bytes_there_is_an_image_or_a_reason(kind, edits):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)), kind)
    for place, written in edits:
        at = int(place * len(data))
        data = data[:at] + written + data[at + max(len(written), 3) :]

    class Memory(NamedTuple):
        data: bytes

        def read(self) -> bytes:
            return self.data

    result = images.convert(Memory(data), images.Task(layouts.CENTRE_SQUARE, RESOLUTION))
    assert bool(result.png) != bool(result.failure)
    if result.png:
        with Image.open(io.BytesIO(result.png)) as image:
            assert (image.size, image.mode) == ((RESOLUTION, RESOLUTION), "RGB")
            image.load()
    else:
        assert "\n" not in result.failure
