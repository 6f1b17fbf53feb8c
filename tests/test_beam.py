"""Preparation by Beam gives the bytes that one machine gives, whatever the workers, and publishes last.

In an object store nothing is renamed, and the description is written last.
"""

import concurrent.futures
import errno
import importlib.util
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import file_sha256
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.prepared import beam, builder, conversion, reading
from facevae_jax.data.sources import images
from facevae_jax.data.sources.images import CENTER_SQUARE
from facevae_jax.prepare import prepare
from tests.bucket import Bucket, bucket
from tests.conftest import REPOSITORY, assert_one_line_error, messages, run_module
from tests.test_conversion import PER_SHARD, RESOLUTION, _small_shards, content, converted, expected, source

__all__ = ["_small_shards", "bucket", "converted", "expected", "source"]  # fixtures
URL = "s3://bucket/data"
PROCESSES = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs the extra beam"),
]


def run(source: pathlib.Path, data_dir: pathlib.Path | str, options: str = "", **others) -> builder.Prepared:
    given = {"name": "toy", "resolution": RESOLUTION, "on_bad_image": "skip", "options": options} | others
    return beam.prepare_dataset(folder_layout(source), data_dir=data_dir, **given)


@pytest.mark.parametrize("options", ["", "--direct_num_workers=3 --direct_running_mode=multi_threading", PROCESSES])
def test_the_bytes_are_those_of_one_machine(source, expected, tmp_path, options):
    result = run(source, tmp_path / "out", options)
    assert content(result.directory) == expected
    assert (sum(result.images.values()), result.bad, result.reused) == (58, 2, 0)
    assert reading.split_sizes(result.directory) == result.images
    assert [path.name for path in result.directory.parent.iterdir()] == [result.directory.name]


def test_a_run_that_failed_resumes(source, expected, tmp_path, converted, monkeypatch):
    begun, writer = [], conversion.writer

    def fail(path):
        begun.append(path)
        if len(begun) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return writer(path)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "writer", fail)
        with pytest.raises(
            UserError, match=r"failed \(OSError: .*No space left on device: '.*array_record-.*'\)"
        ) as caught:
            run(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert not reading.is_published(reading.dataset_directory(tmp_path, name="toy", resolution=RESOLUTION))
    converted.clear()
    result = run(source, tmp_path)
    assert 0 < result.reused <= 60 - len(converted) <= result.reused + 2  # the two bad images are reused too
    assert content(result.directory) == expected


def test_two_workers_with_the_same_shard(source, tmp_path):
    """A runner may give a shard away twice: each writes aside, and the last that is whole has the name."""
    shard = next(iter(conversion.plan_shards(folder_layout(source), resolution=RESOLUTION)))
    task, folder, manifests = images.Task(CENTER_SQUARE, RESOLUTION), tmp_path / "out", tmp_path / "manifests"
    job, file = conversion.Job("toy", task, [], folder, manifests, threads=1), shard.file_name("toy")
    for path in (folder, manifests):
        path.mkdir()
    beam.list_of(file, job).write_bytes(pickle.dumps(shard._replace(members=list(shard.members))))
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        list(executor.map(beam.convert_shard, [file] * 4, [job] * 4))
    assert conversion.read_manifest(job.manifest(shard)).sha256 == file_sha256(folder / file)
    assert [path.name for path in folder.iterdir()] == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--direct_running_mode=fast", "invalid choice: 'fast' .*multi_processing"),
        ("--direct_workers=2", "direct_workers is not an option of Beam's"),
        ("--runner=SpaceRunner", "Unexpected pipeline runner: SpaceRunner"),
        ("--runner='", "No closing quotation"),
    ],
)
def test_options_that_beam_does_not_know(source, tmp_path, options, message, capfd):
    with pytest.raises(UserError, match=message) as caught:
        run(source, tmp_path, options)
    assert str(caught.value).startswith(f"beam_options={options!r}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_command(source, tmp_path):
    flags = ["--layout=folder", f"--source={source}", "--resolution=32", f"--data_dir={tmp_path}"]
    refused = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}")
    assert_one_line_error(refused, "2 of 60 images", "--on_bad_image=skip")
    result = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}", "--on_bad_image=skip")
    assert (result.returncode, messages(result)) == (0, []), result.stderr
    assert "note: 58 images were reused" in result.stdout
    again = run_module("facevae_jax.prepare", *flags)
    assert again.stdout.startswith("already prepared: ")


def test_a_worker_process_that_fails_is_one_line(source, tmp_path):
    for split in ("train", "validation"):  # a folder where a shard must go
        shard = f"folder-{split}.array_record-00000-of-00001"
        (tmp_path / "folder" / "32" / builder.INCOMPLETE / reading.VERSION / shard).mkdir(parents=True)
    flags = ["--layout=folder", f"--source={source}", "--resolution=32", f"--data_dir={tmp_path}"]
    result = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}", "--on_bad_image=skip")
    assert_one_line_error(result, "the pipeline failed (IsADirectoryError", "the workers' log is ")
    log = pathlib.Path(result.stderr.rpartition(" is ")[2].strip().removesuffix("."))
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("options", ["", PROCESSES])
def test_an_interrupt_ends_cleanly(tmp_path, options):
    source = tmp_path / "faces"
    source.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8))
    picture.save(source / "0.png", compress_level=1)
    for i in range(1, 40):  # of a shard that takes seconds
        (source / f"{i}.png").symlink_to(source / "0.png")
    flags = ["--layout=folder", f"--source={source}", "--resolution=1024", f"--data_dir={tmp_path}"]
    command, pipe = [sys.executable, "-m", "facevae_jax.prepare", *flags, f"--beam_options={options}"], subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True) as process:
        made = tmp_path / "folder" / "1024" / builder.INCOMPLETE / reading.VERSION
        while process.poll() is None and not list(made.glob(".folder-train*.tmp")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert error == "stopped: the same command resumes from what is done.\n"
    assert not reading.prepared_datasets(tmp_path)


@pytest.fixture
def directory(bucket):
    """Behind the URL, where the dataset will be."""
    return bucket / "data" / "toy" / str(RESOLUTION) / reading.VERSION


def test_a_dataset_in_an_object_store(source, expected, directory):
    result = run(source, URL)
    assert content(directory) == expected
    assert str(result.directory) == f"{URL}/toy/{RESOLUTION}/{reading.VERSION}"
    assert Bucket.written[-1] == str(directory / reading.INFO_FILE)
    assert Bucket.written.count(Bucket.written[-1]) == 1
    assert all(reading.VERSION not in path for path in Bucket.deleted)
    assert [path.name for path in directory.parent.iterdir()] == [reading.VERSION]
    assert list(reading.split_sizes(result.directory)) == ["train", "validation"]
    with pytest.raises(UserError, match="is prepared already"):
        run(source, URL)
    assert content(directory) == expected


def test_a_store_that_refuses_the_metadata(source, expected, directory, converted):
    Bucket.refused = "features.json"
    with pytest.raises(UserError, match=rf"data_dir='{URL}': .*cannot be written \(Permission denied\)"):
        run(source, URL)
    assert not (directory / reading.INFO_FILE).exists()
    Bucket.refused = ""
    converted.clear()
    run(source, URL)
    assert not converted
    assert content(directory) == expected


def test_a_store_is_cleared_of_another_run_and_a_damaged_shard(source, expected, directory, converted):
    with pytest.raises(UserError, match="2 of 60 images"):
        run(source, URL, on_bad_image="error")
    assert (directory.parent / builder.INCOMPLETE / builder.BAD_IMAGES).exists()
    (directory / "toy-train.array_record-00000-of-00099").write_bytes(b"of a run over more images")
    damaged = next(directory.glob("*train.array_record-00001*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    converted.clear()
    run(source, URL)
    assert len(converted) == PER_SHARD
    assert content(directory) == expected


def test_a_store_that_cannot_be_written(source, bucket):
    Bucket.refused = "bucket"
    with pytest.raises(UserError, match=rf"data_dir='{URL}' cannot be used \(Permission denied\)"):
        run(source, URL)


def test_the_command_with_an_object_store(source, bucket, capsys):
    given = {"layout": "folder", "source": str(source), "resolution": RESOLUTION, "data_dir": URL}
    with pytest.raises(UserError, match="is not a folder of this machine: choose one, or add beam_options="):
        prepare(**given)
    with pytest.raises(UserError, match="layout=tfds reads its source there"):
        prepare(**given | {"layout": "tfds", "source": "lfw"}, beam_options="")
    prepare(**given, beam_options="", on_bad_image="skip")
    *_, prepared, following = capsys.readouterr().out.splitlines()
    assert prepared.startswith(f"prepared: {URL}/folder/{RESOLUTION}/1.0.0 (")
    assert "python -m facevae_jax.main" in following
    assert f"--config.data.data_dir={URL}" in following
    prepare(**given, beam_options="")
    assert capsys.readouterr().out.startswith("already prepared: ")
