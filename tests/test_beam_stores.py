"""Preparation by Beam into an object store: nothing is renamed there, and the description is written last."""

import errno
import pathlib

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from facevae_jax.core.errors import UserError
from facevae_jax.data.prepared import builder, reading, records
from facevae_jax.prepare import prepare
from tests.test_beam import pytestmark, run
from tests.test_conversion import PER_SHARD, RESOLUTION, _small_shards, content, converted, expected, source

__all__ = ["_small_shards", "converted", "expected", "pytestmark", "source"]
BUCKET = "s3://bucket/data"


class ObjectStore(MemoryFileSystem):
    """Behaves like an object store: an object appears when its upload ends, and nothing can be renamed."""

    protocol = "s3"
    written: list[str] = []  # noqa: RUF012 - names in the order in which they were uploaded
    deleted: list[str] = []  # noqa: RUF012
    refused = ""  # uploads whose name contains this fail

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
    prefix = f"/bucket/data/toy/{RESOLUTION}/{reading.VERSION}/"
    folder.mkdir()
    for path, file in store.store.items():
        if path.startswith(prefix):
            (folder / path.removeprefix(prefix)).write_bytes(file.getvalue())
    return content(folder)


def test_a_dataset_in_an_object_store(source, expected, tmp_path, store):
    result = run(source, BUCKET)
    assert stored(store, tmp_path / "copy") == expected
    assert str(result.directory) == f"{BUCKET}/toy/{RESOLUTION}/{reading.VERSION}"
    assert store.written[-1].endswith(f"/{reading.VERSION}/{records.INFO_FILE}")
    assert store.written.count(store.written[-1]) == 1
    assert all(reading.VERSION not in path for path in store.deleted)
    assert not [path for path in store.store if builder.INCOMPLETE in path]
    assert list(reading.split_sizes(result.directory)) == ["train", "validation"]


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


def test_a_store_is_cleared_of_another_run_and_a_damaged_shard(source, expected, tmp_path, store, converted):
    with pytest.raises(UserError, match="2 of 60 images"):
        run(source, BUCKET, on_bad_image="error")
    assert [path for path in store.store if path.endswith(f"{builder.INCOMPLETE}/{builder.BAD_IMAGES}")]
    folder = reading.dataset_directory(BUCKET, name="toy", resolution=RESOLUTION)
    (folder / "toy-train.array_record-00000-of-00099").write_bytes(b"of a run over more images")
    damaged = next(path for path in folder.iterdir() if "train.array_record-00001" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    converted.clear()
    run(source, BUCKET)
    assert len(converted) == PER_SHARD
    assert stored(store, tmp_path / "copy") == expected


def test_what_is_published_in_a_store_is_not_overwritten(source, store):
    run(source, BUCKET)
    before = dict(store.store)
    with pytest.raises(UserError, match="is prepared already"):
        run(source, BUCKET)
    assert store.store == before


def test_locations_that_cannot_be_written(source, store):
    store.refused = "bucket"
    for data_dir, message in [
        (BUCKET, r"--data_dir='s3://bucket/data' cannot be used \(Permission denied\)"),
        ("ftp://a/b", "--data_dir='ftp://a/b': use a local folder or one of gs://"),
        ("az://container/data", "--data_dir='az://container/data' cannot be used .*pip install adlfs"),
        (__file__, "cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            run(source, data_dir)


def test_the_command_with_an_object_store(source, store, capsys):
    given = {"layout": "folder", "source": str(source), "resolution": RESOLUTION, "data_dir": BUCKET}
    with pytest.raises(UserError, match="is not a folder of this machine: choose one, or add --beam_options="):
        prepare(**given)
    with pytest.raises(UserError, match="--layout=tfds reads its source there"):
        prepare(**given | {"layout": "tfds", "source": "lfw"}, beam_options="")
    prepare(**given, beam_options="", on_bad_image="skip")
    *_, prepared, following = capsys.readouterr().out.splitlines()
    assert prepared.startswith(f"prepared: {BUCKET}/folder/{RESOLUTION}/1.0.0 (")
    assert "python -m facevae_jax.main" in following
    assert f"--config.data.data_dir={BUCKET}" in following
    prepare(**given, beam_options="")
    assert capsys.readouterr().out.startswith("already prepared: ")
