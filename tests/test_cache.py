import dataclasses
import multiprocessing
import shutil

import fsspec
import numpy as np
import pytest

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.prepared import cache, conversion, reading
from tests.bucket import Bucket, bucket
from tests.test_conversion import PER_SHARD, RESOLUTION, flip, prepare, write_images

__all__ = ["bucket"]
URL = "s3://bucket/tfds"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """45 images, in 6 shards or so."""
    data_dir = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * PER_SHARD)
        prepare(write_images(tmp_path_factory.mktemp("source") / "faces", 45), data_dir)
    return data_dir


@pytest.fixture
def remote(prepared, bucket):
    """The folder that is behind the dataset's URL."""
    shutil.copytree(prepared, bucket / "tfds")
    return bucket / "tfds" / "toy" / str(RESOLUTION) / "1.0.0"


@pytest.fixture
def config(tmp_path, remote):
    return DataConfig(name="toy", resolution=RESOLUTION, data_dir=URL, cache_dir=str(tmp_path / "cache"))


def records_read() -> list[str]:
    return sorted(name for path in Bucket.read if ".array_record-" in (name := path.rpartition("/")[2]))


def test_a_remote_dataset_is_the_local_one_and_fetched_once(config, prepared):
    local = DataConfig(name="toy", resolution=RESOLUTION, data_dir=str(prepared))
    for split in ("train", "validation") * 2:
        np.testing.assert_array_equal(open_dataset(config).images(split), open_dataset(local).images(split))
        assert len(open_dataset(config).labels(split).values) == open_dataset(local).sizes[split]
    read = records_read()
    assert len(read) == len(set(read)) >= 5
    assert cache.local_dataset(local) == reading.find_dataset(prepared, name="toy", resolution=RESOLUTION)


def test_files_of_other_splits_are_fetched_when_they_are_needed(config):
    cache.local_dataset(config, ["validation"])
    assert {name.partition(".")[0] for name in records_read()} == {"toy-validation"}
    cache.local_dataset(config, ["train", "test"])  # of which there is none
    assert len(records_read()) == len(set(records_read())) >= 5


def test_an_interrupted_fetch_resumes(config, remote, monkeypatch):
    fetch, left = cache._fetch, [2]

    def stop(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return fetch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_fetch", stop)
        patch.setattr(cache, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            cache.local_dataset(config)
    assert len(records_read()) == 2
    directory = cache.local_dataset(config)
    assert len(records_read()) == len(set(records_read()))
    for path in (path for path in remote.iterdir() if path.is_file()):
        assert (directory / path.name).read_bytes() == path.read_bytes()


def test_a_dataset_that_was_replaced_is_fetched_again_without_its_store(config, remote):
    directory = cache.local_dataset(config)
    open_dataset(config).images("train")
    assert (directory / "pixels" / "train.npy").exists()
    info = remote / "dataset_info.json"
    info.write_text(info.read_text().replace('"description": "', '"description": "new '))
    Bucket.read.clear()
    cache.local_dataset(config)
    assert len(records_read()) >= 5
    assert not (directory / "pixels").exists()


def test_a_damaged_file_is_refused_by_name(config, remote, tmp_path):
    path = sorted(remote.glob("*train.array_record-*"))[1]
    flip(path)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        open_dataset(config).images("train")
    assert not list((tmp_path / "cache").rglob(f"*{path.name}*"))


def fetch_and_count(arguments):
    config, root = arguments
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.root = root
    cache.local_dataset(config)
    return len(records_read())


@pytest.mark.slow
def test_two_processes_of_a_host_fetch_once(config, remote):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.map(fetch_and_count, [(config, Bucket.root)] * 2, chunksize=1)
    assert sorted(counts) == [0, len(list(remote.glob("*.array_record-*")))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "toys"}, r"config\.data\.name='toys'.* is not prepared in config\.data\.data_dir='s3:"),
        ({"data_dir": "ftp://bucket/tfds"}, "use a local folder or one of gs://, s3://"),
        ({"data_dir": "gs://bucket/tfds"}, "data_dir='gs://bucket/tfds' .*pip install gcsfs"),
    ],
)
def test_what_cannot_be_found_is_one_line(config, changes, message):
    with pytest.raises(UserError, match=message):
        cache.local_dataset(dataclasses.replace(config, **changes))


def test_a_bucket_that_cannot_be_reached_is_one_line(config, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Bucket, "isdir", fail)
    with pytest.raises(UserError, match=r"data_dir='s3://bucket/tfds' .*no route to host"):
        cache.local_dataset(config)


def test_a_cache_without_room_or_permission(config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(UserError, match=r"cache_dir=.* takes 0\.0 GB more, 0\.0 GB are free"):
            cache.local_dataset(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.data\.cache_dir='.*file/x' cannot be written to"):
        cache.local_dataset(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "x")))


def test_damaged_records_are_one_line(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    directory = reading.find_dataset(tmp_path / "data", name="toy", resolution=RESOLUTION)
    path = sorted(directory.glob("*train.array_record-*"))[-1]
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 3, len(data) // 3 * 2, 50):
        data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"1\.0\.0: the split 'train' cannot be read"):
        list(reading.read_images(directory, "train"))


def test_the_list_of_checksums_is_not_needed(config, remote):
    (remote / reading.CHECKSUMS).unlink()
    directory = cache.local_dataset(config)
    cache.local_dataset(config)
    assert len(records_read()) == len(set(records_read())) == len(list(directory.glob("*.array_record-*")))
