"""Preparation by Beam into an object store: nothing is renamed there, and the description is written last."""

import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.data.prepared import builder, reading, records
from facevae_jax.prepare import prepare
from tests.bucket import Bucket, bucket
from tests.test_beam import pytestmark, run
from tests.test_conversion import PER_SHARD, RESOLUTION, _small_shards, content, converted, expected, source

__all__ = ["_small_shards", "bucket", "converted", "expected", "pytestmark", "source"]
URL = "s3://bucket/data"


@pytest.fixture
def directory(bucket):
    """Behind the URL, where the dataset will be."""
    return bucket / "data" / "toy" / str(RESOLUTION) / reading.VERSION


def test_a_dataset_in_an_object_store(source, expected, directory):
    result = run(source, URL)
    assert content(directory) == expected
    assert str(result.directory) == f"{URL}/toy/{RESOLUTION}/{reading.VERSION}"
    assert Bucket.written[-1] == str(directory / records.INFO_FILE)
    assert Bucket.written.count(Bucket.written[-1]) == 1
    assert all(reading.VERSION not in path for path in Bucket.deleted)
    assert [path.name for path in directory.parent.iterdir()] == [reading.VERSION]
    assert list(reading.split_sizes(result.directory)) == ["train", "validation"]


def test_a_store_that_refuses_the_metadata(source, expected, directory, converted):
    Bucket.refused = "features.json"
    with pytest.raises(UserError, match=rf"--data_dir='{URL}': .*cannot be written \(Permission denied\)"):
        run(source, URL)
    assert not (directory / records.INFO_FILE).exists()
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


def test_what_is_published_in_a_store_is_not_overwritten(source, bucket):
    run(source, URL)
    before = content(bucket)
    with pytest.raises(UserError, match="is prepared already"):
        run(source, URL)
    assert content(bucket) == before


def test_locations_that_cannot_be_written(source, bucket):
    Bucket.refused = "bucket"
    for data_dir, message in [
        (URL, r"--data_dir='s3://bucket/data' cannot be used \(Permission denied\)"),
        ("ftp://a/b", "--data_dir='ftp://a/b': use a local folder or one of gs://"),
        ("az://container/data", "--data_dir='az://container/data' cannot be used .*pip install adlfs"),
        (__file__, "cannot be written to"),
    ]:
        with pytest.raises(UserError, match=message):
            run(source, data_dir)


def test_the_command_with_an_object_store(source, bucket, capsys):
    given = {"layout": "folder", "source": str(source), "resolution": RESOLUTION, "data_dir": URL}
    with pytest.raises(UserError, match="is not a folder of this machine: choose one, or add --beam_options="):
        prepare(**given)
    with pytest.raises(UserError, match="--layout=tfds reads its source there"):
        prepare(**given | {"layout": "tfds", "source": "lfw"}, beam_options="")
    prepare(**given, beam_options="", on_bad_image="skip")
    *_, prepared, following = capsys.readouterr().out.splitlines()
    assert prepared.startswith(f"prepared: {URL}/folder/{RESOLUTION}/1.0.0 (")
    assert "python -m facevae_jax.main" in following
    assert f"--config.data.data_dir={URL}" in following
    prepare(**given, beam_options="")
    assert capsys.readouterr().out.startswith("already prepared: ")
