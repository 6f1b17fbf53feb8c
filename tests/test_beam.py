"""Preparation by Beam gives the bytes that one machine gives, whatever the workers, and publishes last."""

import concurrent.futures
import errno
import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="needs the extra beam")

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from facevae_jax import prepare
from facevae_jax.data import beam, beam_runners, builder, conversion, dataset, images, layouts, locations, records
from facevae_jax.data.archives import TarMember, ZipMember
from facevae_jax.errors import UserError
from tests.conftest import REPOSITORY, assert_one_line_error, run_module
from tests.test_conversion import PER_SHARD, RESOLUTION, content, write_images

PROCESSES = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
BUCKET = "s3://bucket/data"


class ObjectStore(MemoryFileSystem):
    """As object stores are: an object appears when its upload ends, and there is nothing to be renamed."""

    protocol = "s3"
    written: list[str] = []  # noqa: RUF012 - names in the order in which they were uploaded
    deleted: list[str] = []  # noqa: RUF012
    refused = ""  # what an upload's name must not have in it

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("s3://"))

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            if self.refused and self.refused in path:
                raise PermissionError(errno.EACCES, "Permission denied")
            self.written.append(path)
        return super()._open(path, mode, **options)

    def _rm(self, path):
        self.deleted.append(path)
        super()._rm(path)

    def mv(self, *arguments, **options):
        raise NotImplementedError("object stores copy")

    def mkdir(self, *arguments, **options):
        raise NotImplementedError("object stores have no folders")

    makedirs = mkdir


@pytest.fixture
def store(monkeypatch) -> type[ObjectStore]:
    """An empty s3://, in this process."""
    fsspec.register_implementation("s3", ObjectStore, clobber=True)
    monkeypatch.setattr(ObjectStore, "refused", "")
    for kept in (ObjectStore.written, ObjectStore.deleted, ObjectStore.store, ObjectStore.pseudo_dirs):
        kept.clear()
    return ObjectStore


def stored(store: type[ObjectStore], folder: pathlib.Path) -> dict[str, str]:
    """The dataset in the store, copied into an empty folder; as `content`."""
    prefix = f"/bucket/data/toy/{RESOLUTION}/{dataset.VERSION}/"
    folder.mkdir()
    for path, file in store.store.items():
        if path.startswith(prefix):
            (folder / path.removeprefix(prefix)).write_bytes(file.getvalue())
    return content(folder)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * PER_SHARD)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """60 images, two of them bad: seven or so shards."""
    folder = tmp_path_factory.mktemp("source") / "faces"
    write_images(folder, 60)
    (folder / "0033.png").write_bytes(b"not an image")
    (folder / "0047.png").write_bytes((folder / "0047.png").read_bytes()[:1000])
    return folder


@pytest.fixture
def expected(source, tmp_path) -> dict[str, str]:
    """What one machine writes without Beam."""
    layout = layouts.folder(source)
    options = {"name": "toy", "resolution": RESOLUTION, "workers": 2}
    made = builder.prepare_dataset(layout, data_dir=tmp_path / "expected", on_bad_image="skip", **options)
    return content(made.directory)


@pytest.fixture
def converted(monkeypatch) -> list[pathlib.Path]:
    """The files that threads of this process decode."""
    files, convert = [], images.convert

    def record(file, task):
        files.append(file)
        return convert(file, task)

    monkeypatch.setattr(images, "convert", record)
    return files


def run(source: pathlib.Path, data_dir: pathlib.Path | str, options: str = "", **others) -> builder.Prepared:
    given = {"name": "toy", "resolution": RESOLUTION, "on_bad_image": "skip", "options": options} | others
    return beam.prepare_dataset(layouts.folder(source), data_dir=data_dir, **given)


@pytest.mark.parametrize(
    "options", ["", "--direct_num_workers=2", "--direct_num_workers=3 --direct_running_mode=multi_threading", PROCESSES]
)
def test_the_bytes_are_those_of_one_machine(source, expected, tmp_path, options):
    result = run(source, tmp_path / "out", options)
    assert content(result.directory) == expected
    assert (sum(result.images.values()), result.bad, result.taken_over) == (58, 2, 0)
    assert dataset.split_sizes(result.directory) == result.images
    assert [path.name for path in result.directory.parent.iterdir()] == [result.directory.name]


def test_the_list_of_a_shard(source):
    """What is not a path, and values that JSON does not know, reach the workers."""
    record = records.Record("/data/toy/1.0.0", "train", 7)
    files = [source / "0000.png", ZipMember("a.zip", "b\udcff.png"), TarMember("a.tar", 512, -1), record]
    members = [layouts.SourceImage(f"{i}\udcff.png", file, (0.1, 1e-9)) for i, file in enumerate(files)]
    shard = conversion.Shard("train", 3, 7, members)
    assert beam.decode_shard(beam.encode_shard(shard)) == shard
    unknown = conversion.Shard("train", 0, 1, [layouts.SourceImage("a", source, (math.nan,))])
    assert math.isnan(beam.decode_shard(beam.encode_shard(unknown)).members[0].attributes[0])


def test_bad_images_are_an_error_and_then_left_out(source, expected, tmp_path, converted):
    with pytest.raises(UserError, match=r"2 of 60 images cannot be used \(0033.png.*nothing was published"):
        run(source, tmp_path / "out", on_bad_image="error")
    incomplete = tmp_path / "out" / "toy" / str(RESOLUTION) / builder.INCOMPLETE
    listed = [json.loads(line)["path"] for line in (incomplete / builder.BAD_IMAGES).read_text().splitlines()]
    assert sorted(listed) == ["0033.png", "0047.png"]
    assert not dataset.prepared_datasets(tmp_path / "out")
    assert len(converted) == 60
    converted.clear()
    result = run(source, tmp_path / "out", on_bad_image="skip")
    assert content(result.directory) == expected
    assert (converted, result.taken_over) == ([], 58)


@pytest.fixture
def full_disk(monkeypatch):
    """The third shard that is begun cannot be written; a context in which that is so."""
    begun, write_shard = [], conversion.write_shard

    def fail(*arguments, **options):
        begun.append(arguments)
        if len(begun) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(beam, "write_shard", fail)
        yield patch


@pytest.mark.parametrize("data_dir", [None, BUCKET])
def test_a_pass_that_fails_is_gone_on_with(source, expected, tmp_path, store, converted, full_disk, data_dir):
    data_dir = data_dir or tmp_path / "out"
    with pytest.raises(UserError, match=r"the pipeline failed \(OSError: .*No space left on device\)") as caught:
        run(source, data_dir)
    assert "\n" not in str(caught.value)
    assert not dataset.is_published(dataset.dataset_directory(data_dir, name="toy", resolution=RESOLUTION))
    full_disk.undo()
    converted.clear()
    result = run(source, data_dir)
    assert result.taken_over > 0
    assert result.taken_over <= 60 - len(converted) <= result.taken_over + 2  # bad images are taken over too
    there = content(result.directory) if data_dir != BUCKET else stored(store, tmp_path / "copy")
    assert there == expected


def test_a_worker_that_is_killed_leaves_nothing_behind(source, expected, tmp_path):
    left = tmp_path / "toy" / str(RESOLUTION) / builder.INCOMPLETE / dataset.VERSION / ".toy-train.0.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of a shard")
    assert content(run(source, tmp_path).directory) == expected


def test_two_workers_with_the_same_shard(source, tmp_path):
    """A runner may give a shard away twice: each writes aside, and the last that is whole has the name."""
    shard = next(iter(conversion.plan_shards(layouts.folder(source), resolution=RESOLUTION)))
    (tmp_path / "shard").write_bytes(beam.encode_shard(shard))
    task = images.Task(layouts.CENTRE_SQUARE, RESOLUTION)
    folders = {"folder": str(tmp_path / "out"), "notes": str(tmp_path / "notes"), "plan": str(tmp_path)}
    for folder in ("out", "notes"):
        (tmp_path / folder).mkdir()
    job = beam.Job(task=task, attributes=[], threads=1, **folders)
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        list(executor.map(beam.convert_shard, ["shard"] * 4, [job] * 4))
    note = conversion.read_note(tmp_path / "notes" / "shard.json")
    assert note.sha256 == conversion.file_sha256(tmp_path / "out" / "shard")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard"]


def test_a_dataset_in_an_object_store(source, expected, tmp_path, store):
    result = run(source, BUCKET)
    assert stored(store, tmp_path / "copy") == expected
    assert str(result.directory) == f"{BUCKET}/toy/{RESOLUTION}/{dataset.VERSION}"
    assert store.written[-1].endswith(f"/{dataset.VERSION}/{records.INFO_FILE}")
    assert store.written.count(store.written[-1]) == 1
    assert all(dataset.VERSION not in path for path in store.deleted)
    assert not [path for path in store.store if builder.INCOMPLETE in path]
    assert list(dataset.split_sizes(result.directory)) == ["train", "validation"]


def test_a_store_that_refuses_the_metadata(source, expected, tmp_path, store, converted):
    store.refused = "features.json"
    with pytest.raises(UserError, match=rf"--data_dir='{BUCKET}': .*cannot be written \(Permission denied\)"):
        run(source, BUCKET)
    assert not [path for path in store.store if records.INFO_FILE in path]
    store.refused = ""
    converted.clear()
    run(source, BUCKET)
    assert not converted
    assert stored(store, tmp_path / "copy") == expected


def test_a_store_is_cleared_of_another_pass_and_a_damaged_shard(source, expected, tmp_path, store, converted):
    with pytest.raises(UserError, match="2 of 60 images"):
        run(source, BUCKET, on_bad_image="error")
    assert [path for path in store.store if path.endswith(f"{builder.INCOMPLETE}/{builder.BAD_IMAGES}")]
    folder = locations.location(f"{BUCKET}/toy/{RESOLUTION}/{dataset.VERSION}")
    (folder / "toy-train.array_record-00000-of-00099").write_bytes(b"of a pass over more images")
    damaged = next(path for path in folder.iterdir() if "train.array_record-00001" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    converted.clear()
    run(source, BUCKET)
    assert len(converted) == PER_SHARD
    assert stored(store, tmp_path / "copy") == expected


def test_what_is_published_in_a_store_is_not_overwritten(source, store):
    run(source, BUCKET)
    before = dict(store.store)
    with pytest.raises(UserError, match="is prepared already, and what others may be reading is not overwritten"):
        run(source, BUCKET)
    assert store.store == before


def test_locations_that_cannot_be_written(source, store, tmp_path):
    store.refused = "bucket"
    with pytest.raises(UserError, match=r"--data_dir='s3://bucket/data' cannot be written to \(Permission denied\)"):
        run(source, BUCKET)
    with pytest.raises(UserError, match=r"--data_dir='ftp://a/b': the scheme ftp:// is not known: use gs://"):
        run(source, "ftp://a/b")
    with pytest.raises(UserError, match=r"cannot be written to \(.*adlfs.*that its library is installed"):
        run(source, "az://container/data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        run(source, tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--direct_running_mode=fast", "invalid choice: 'fast' .*multi_processing"),
        ("--direct_num_workers=two", "invalid int value: 'two'"),
        ("--direct_workers=2", "--direct_workers is no option of Beam's"),
        ("multi_processing", "multi_processing is no option of Beam's"),
        ("--runner=SpaceRunner", "Unexpected pipeline runner: SpaceRunner"),
        ("--runner='", "No closing quotation"),
    ],
)
def test_options_that_beam_does_not_know(source, tmp_path, options, message, capfd):
    with pytest.raises(UserError, match=message) as caught:
        run(source, tmp_path, options)
    assert str(caught.value).startswith(f"--beam_options={options!r}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_went_wrong_on_a_worker():
    traceback = (
        "Traceback:\n  File \"a.py\", line 3\nRuntimeError: OSError: [Errno 5] I/O [while running 'convert']\n\n"
    )
    assert beam_runners.failure(RuntimeError(traceback)) == "OSError: [Errno 5] I/O"
    assert beam_runners.failure(RuntimeError("facevae_jax.errors.UserError: a: b [while running 'x']")) == "a: b"
    assert beam_runners.failure(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("options", "cores", "threads"),
    [
        ("", 4, 5),
        (PROCESSES, 8, 4),
        (PROCESSES, 1, 1),
        ("--direct_num_workers=0", 8, 1),
        ("--runner=FlinkRunner", 8, 2),
    ],
)
def test_threads_of_a_worker(monkeypatch, options, cores, threads):
    monkeypatch.setattr(beam_runners, "available_cpus", lambda: cores)
    assert beam_runners.threads_per_worker(beam_runners.parse_options(options)) == threads


def test_the_command(source, tmp_path):
    flags = ["--layout=folder", f"--source={source}", "--resolution=32", f"--data_dir={tmp_path}"]
    refused = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}")
    assert_one_line_error(refused, "2 of 60 images", "--on_bad_image=skip")
    result = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}", "--on_bad_image=skip")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "note: 58 images were taken over from a run that was stopped." in result.stdout
    again = run_module("facevae_jax.prepare", *flags)
    assert again.stdout.startswith("already prepared: ")


def test_a_worker_process_that_fails_is_told_in_one_line(source, tmp_path):
    splits = ("train", "validation")
    for split in splits:  # a folder where a shard must go
        shard = f"folder-{split}.array_record-00000-of-00001"
        (tmp_path / "folder" / "32" / builder.INCOMPLETE / dataset.VERSION / shard).mkdir(parents=True)
    flags = ["--layout=folder", f"--source={source}", "--resolution=32", f"--data_dir={tmp_path}"]
    result = run_module("facevae_jax.prepare", *flags, f"--beam_options={PROCESSES}", "--on_bad_image=skip")
    assert_one_line_error(result, "the pipeline failed (IsADirectoryError", "what the workers say is in ")
    log = pathlib.Path(result.stderr.rpartition(" is in ")[2].strip().removesuffix("."))
    assert "Traceback" in log.read_text()
    log.unlink()


def test_the_command_with_an_object_store(source, store, capsys):
    given = {"layout": "folder", "source": str(source), "resolution": RESOLUTION, "data_dir": BUCKET}
    with pytest.raises(UserError, match="is not a folder of this machine: choose one, or add --beam_options="):
        prepare.prepare(**given)
    with pytest.raises(UserError, match="--layout=tfds reads its source there"):
        prepare.prepare(**given | {"layout": "tfds", "source": "lfw"}, beam_options="")
    prepare.prepare(**given, beam_options="", on_bad_image="skip")
    *_, prepared, following = capsys.readouterr().out.splitlines()
    assert prepared.startswith(f"prepared: {BUCKET}/folder/{RESOLUTION}/1.0.0 (")
    assert "python -m facevae_jax.main" in following
    assert f"--config.data.data_dir={BUCKET}" in following
    prepare.prepare(**given, beam_options="")
    assert capsys.readouterr().out.startswith("already prepared: ")


@pytest.mark.parametrize("options", ["", PROCESSES])
def test_an_interrupt_ends_cleanly(tmp_path, options):
    source = tmp_path / "faces"
    source.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8))
    picture.save(source / "0.png", compress_level=1)
    for i in range(1, 40):  # of a shard that takes seconds
        (source / f"{i}.png").symlink_to(source / "0.png")
    flags = ["--layout=folder", f"--source={source}", "--resolution=1024", f"--data_dir={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-m", "facevae_jax.prepare", *flags, f"--beam_options={options}"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        made = tmp_path / "folder" / "1024" / builder.INCOMPLETE / dataset.VERSION
        while process.poll() is None and not list(made.glob(".folder-train*.tmp")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert error == "stopped: the same command goes on from what is done.\n"
    assert not dataset.prepared_datasets(tmp_path)
