"""An interrupted preparation resumes and ends with the same bytes, whatever happened to it."""

import fcntl
import hashlib
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

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.prepared import builder, conversion, reading
from facevae_jax.data.sources import images
from tests.conftest import REPOSITORY, assert_one_line_error

RESOLUTION = 32
OPTIONS = {"name": "toy", "resolution": RESOLUTION, "workers": 2}
PER_SHARD = 10


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * PER_SHARD)


def write_images(folder: pathlib.Path, count: int, *, bad: bool = False) -> pathlib.Path:
    """Images of noise; with `bad` two of them are damaged."""
    folder.mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:04d}.png")
    if bad:
        (folder / "0033.png").write_bytes(b"not an image")
        (folder / "0047.png").write_bytes((folder / "0047.png").read_bytes()[:1000])
    return folder


def prepare(source: pathlib.Path, data_dir: pathlib.Path, **options) -> builder.Prepared:
    given = {"data_dir": data_dir} | OPTIONS | options
    return builder.prepare_dataset(folder_layout(source), **given)


def content(directory: pathlib.Path) -> dict[str, str]:
    """Every file's name and the hash of its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: pathlib.Path, position: int | None = None) -> None:
    """Changes a bit of a file, by default in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """60 images, two of them bad: seven or so shards."""
    return write_images(tmp_path_factory.mktemp("source") / "faces", 60, bad=True)


@pytest.fixture
def expected(source, tmp_path) -> dict[str, str]:
    """What an uninterrupted run writes."""
    return content(prepare(source, tmp_path / "expected", on_bad_image="skip").directory)


@pytest.fixture
def converted(monkeypatch) -> list[pathlib.Path]:
    """The files that threads of this process decode from now on, in the order in which this begins."""
    files, convert = [], images.convert

    def record(file, task):
        files.append(file)
        return convert(file, task)

    monkeypatch.setattr(images, "convert", record)
    return files


@pytest.mark.parametrize("images_before", [0, 9, 10, 45, 59])
def test_an_interrupted_run_resumes(source, expected, tmp_path, monkeypatch, converted, images_before):
    convert = images.convert  # which is `converted`'s

    def stop(file, task):
        if len(converted) == images_before:
            raise KeyboardInterrupt
        return convert(file, task)

    with monkeypatch.context() as patch:
        patch.setattr(images, "convert", stop)
        patch.setattr(images, "CHUNK_IMAGES", 1)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", on_bad_image="skip", workers=1)  # images are converted in order
    with pytest.raises(UserError, match="no dataset is prepared there"):
        reading.find_dataset(tmp_path / "out", name="toy", resolution=RESOLUTION)
    converted.clear()
    result = prepare(source, tmp_path / "out", on_bad_image="skip")
    assert content(result.directory) == expected
    sizes = [len(shard.members) for shard in conversion.plan_shards(folder_layout(source), resolution=RESOLUTION)]
    kept = max(end for end in itertools.accumulate(sizes, initial=0) if end <= images_before)
    assert len(converted) == 60 - kept
    assert kept - 2 <= result.reused <= kept
    assert [path.name for path in result.directory.parent.iterdir()] == [result.directory.name]


@pytest.mark.slow
def test_nothing_is_imported_beside_the_threads(source, tmp_path):
    """TFDS replaces `__import__` while it is imported, so that images failed whose decoder was imported meanwhile."""
    code = f"""
import builtins, pathlib, sys
from facevae_jax.data.sources import images
from tests import test_conversion
convert, usual, seen = images.convert, builtins.__import__, []
def check(file, task):
    seen.append('tensorflow_datasets' in sys.modules and builtins.__import__ is usual)
    return convert(file, task)
images.convert = check
test_conversion.prepare(pathlib.Path({str(source)!r}), {str(tmp_path)!r}, on_bad_image='skip')
print(all(seen), len(seen))"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "True 60\n"


def stopped(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Converts everything, but does not publish it, because of the bad images; the folder of what was done."""
    with pytest.raises(UserError, match=r"2 of 60 .* \(0033\.png: .*0047\.png: .*truncated"):
        prepare(source, data_dir)
    assert not reading.prepared_datasets(data_dir)
    return data_dir / "toy" / str(RESOLUTION) / builder.INCOMPLETE


def test_another_policy_reuses_what_is_done(source, expected, tmp_path, converted):
    incomplete = stopped(source, tmp_path)
    listed = [json.loads(line) for line in (incomplete / builder.BAD_IMAGES).read_text().splitlines()]
    assert [entry["path"] for entry in listed] == ["0033.png", "0047.png"]
    converted.clear()
    result = prepare(source, tmp_path, on_bad_image="skip")
    assert content(result.directory) == expected
    assert (sum(result.images.values()), result.bad, result.reused) == (58, 2, 58)
    assert converted == []


@pytest.mark.parametrize("damage", ["flip", "note", "source"])
def test_damaged_and_outdated_shards_are_converted_again(source, expected, tmp_path, converted, damage):
    incomplete = stopped(source, tmp_path)
    shard = next(incomplete.glob("1.0.0/*train.array_record-00002-of-*"))
    first = folder_layout(source).splits["train"][2 * PER_SHARD].file
    if damage == "flip":
        flip(shard)
    elif damage == "note":
        next(incomplete.rglob("*train.array_record-00002-of-*.json")).write_text('{"fingerprint": ')
    else:
        os.utime(first, (1, 1))
    converted.clear()
    assert content(prepare(source, tmp_path, on_bad_image="skip").directory) == expected
    assert first in converted
    assert len(converted) == PER_SHARD


@pytest.mark.slow
def test_kill_9_at_any_moment(source, expected, tmp_path):
    """Each kill comes at a random moment of a process that converts slowly; one that ends first begins a new trial."""
    options = {"data_dir": str(tmp_path / "out"), **OPTIONS, "on_bad_image": "skip"}
    code = f"""
import time, pathlib
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.prepared import builder, conversion
from facevae_jax.data.sources import images
conversion.SHARD_BYTES, convert = {conversion.SHARD_BYTES}, images.convert
images.convert = lambda file, task: (time.sleep(0.03), convert(file, task))[1]
conversion.import_for_writing()
print('ready', flush=True)
builder.prepare_dataset(folder_layout(pathlib.Path({str(source)!r})), **{options!r})"""
    published = reading.dataset_directory(tmp_path / "out", name="toy", resolution=RESOLUTION)
    randomness, killed = random.Random(0), 0
    while killed < 30:
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of util-linux")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_full_and_a_read_only_disk(tmp_path, fault):
    """A disk of 2 MB, in a mount namespace of its own."""
    (tmp_path / "faces").mkdir()
    for i in range(40):  # 3 MB of noise at 160 pixels, 6 MB as PNG of 256
        noise = np.random.default_rng(i).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "faces" / f"{i}.png")
    flags = f"--layout=folder --source=faces --resolution=256 --data_dir={tmp_path}/disk"
    script = f"""cd {tmp_path}; mkdir disk && mount -t tmpfs -o size=2m tmpfs disk && touch mounted || exit
        {"mount -o remount,ro disk" if fault == "read-only" else ""}
        PYTHONPATH={REPOSITORY} {sys.executable} -m facevae_jax.prepare {flags}; code=$?; ls -R disk; exit $code"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not (tmp_path / "mounted").exists():
        pytest.skip("this system does not let its users mount a small disk")
    assert_one_line_error(result, f"{tmp_path}/disk", "No space left" if fault == "full" else "Read-only file system")
    assert "dataset_info.json" not in result.stdout


@pytest.mark.parametrize(
    ("vanishes", "policy", "message"),
    [("out/toy", "skip", "data_dir=.* cannot be"), ("faces", "error", r"\d+ of 60 images .*No such file")],
)
def test_a_folder_that_vanishes_in_the_middle(source, tmp_path, monkeypatch, vanishes, policy, message):
    shutil.copytree(source, tmp_path / "faces")
    convert, left = images.convert, [40]

    def remove_then_convert(file, task):
        left[0] -= 1
        if not left[0]:
            shutil.rmtree(tmp_path / vanishes)
        return convert(file, task)

    monkeypatch.setattr(images, "convert", remove_then_convert)
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "faces", tmp_path / "out", workers=1, on_bad_image=policy)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("dataset_info.json"))


def test_two_at_once_are_refused(source, tmp_path):
    folder = tmp_path / "toy" / str(RESOLUTION) / builder.INCOMPLETE
    folder.mkdir(parents=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this dataset"):
            prepare(source, tmp_path)


def test_splits_and_shards_of_bad_images_alone(tmp_path):
    prepare(write_images(tmp_path / "faces", 40), tmp_path)  # which is replaced
    layout = folder_layout(tmp_path / "faces")
    for image in (*layout.splits["validation"], *layout.splits["train"][PER_SHARD : 2 * PER_SHARD]):
        image.file.write_bytes(b"")
    result = prepare(tmp_path / "faces", tmp_path, on_bad_image="skip")
    trained = len(layout.splits["train"]) - PER_SHARD
    assert result.images == reading.split_sizes(result.directory) == {"train": trained}
    assert len(list(reading.read_images(result.directory, "train"))) == trained
    assert result.bad == 40 - trained
    for image in layout.splits["train"]:
        image.file.write_bytes(b"")
    with pytest.raises(UserError, match="40 of 40 images cannot be used"):
        prepare(tmp_path / "faces", tmp_path, on_bad_image="skip")
    assert reading.split_sizes(result.directory) == {"train": trained}  # the old one is still there
