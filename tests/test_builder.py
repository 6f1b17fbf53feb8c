import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.core.parallel import map_in_order
from facevae_jax.data.layouts import types
from facevae_jax.data.prepared import builder, conversion, reading
from tests.test_conversion import RESOLUTION, content

ATTRIBUTES = (types.Attribute("binary_one", "binary"), types.Attribute("age", "continuous"))


def gradient(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (RESOLUTION, RESOLUTION, 3), np.uint8)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> types.Layout:
    """70 images of exactly the resolution (two reads' worth), whose pixels must therefore arrive unchanged."""
    folder = tmp_path_factory.mktemp("source")
    images = []
    for i in range(70):
        path = folder / f"{i:03d}.png"
        Image.fromarray(gradient(i)).save(path)
        age = types.UNKNOWN if i == 3 else i / 2
        images.append(types.SourceImage(path.name, path, (float(i % 2), age)))
    splits = {"train": images[:66], "validation": images[66:]}
    return types.Layout(kind="folder", source="source", splits=splits, attributes=ATTRIBUTES)


@pytest.fixture(scope="module")
def prepared(layout: types.Layout, tmp_path_factory: pytest.TempPathFactory) -> builder.Prepared:
    data_dir = tmp_path_factory.mktemp("prepared")
    return builder.prepare_dataset(layout, data_dir=data_dir, name="toy", resolution=RESOLUTION, workers=1)


def test_rows_are_in_the_order_of_the_layout(prepared):
    directory = prepared.directory
    assert directory.parts[-3:] == ("toy", "32", "1.0.0")
    assert reading.split_sizes(directory) == prepared.images == {"train": 66, "validation": 4}
    for split, first in (("train", 0), ("validation", 66)):
        images = list(reading.read_images(directory, split))
        expected = [gradient(first + i) for i in range(len(images))]
        np.testing.assert_array_equal(images, expected)


def test_attributes_and_metadata(prepared):
    binary, age = reading.read_attributes(prepared.directory, "train", ["binary_one", "age"]).T
    np.testing.assert_array_equal(binary, np.arange(66) % 2)
    expected = np.arange(66, dtype=np.float32) / 2
    expected[3] = np.nan
    np.testing.assert_array_equal(age, expected)
    metadata = reading.read_metadata(prepared.directory)
    assert metadata["attributes"] == [{"name": a.name, "kind": a.kind} for a in ATTRIBUTES]
    assert metadata["source"] == "source"
    assert metadata["crop"] == "centre square"


def test_no_file_mentions_where_it_was_made(prepared, layout):
    above = str(layout.splits["train"][0].file.parent.parent).encode()
    for path in prepared.directory.iterdir():
        assert above not in path.read_bytes(), path
        assert str(prepared.directory.parent).encode() not in path.read_bytes(), path


def test_tfds_opens_the_dataset(prepared):
    import tensorflow_datasets as tfds

    data_dir = prepared.directory.parent.parent.parent
    source = tfds.data_source(f"toy/{RESOLUTION}", split="validation", data_dir=data_dir)
    assert source[1]["name"] == b"067.png"
    np.testing.assert_array_equal(source[1]["image"], gradient(67))
    assert source[1]["attributes"]["age"] == np.float32(33.5)


def test_workers_and_shards_do_not_change_the_rows(layout, prepared, tmp_path, monkeypatch):
    again = builder.prepare_dataset(layout, data_dir=tmp_path, name="toy", resolution=RESOLUTION, workers=2)
    assert content(again.directory) == content(prepared.directory)

    monkeypatch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * 20)  # 4 shards of at most 20 images
    sharded = builder.prepare_dataset(layout, data_dir=tmp_path, name="sharded", resolution=RESOLUTION, workers=1)
    assert len(list(sharded.directory.glob("sharded-train*"))) == 4
    np.testing.assert_array_equal(
        list(reading.read_images(sharded.directory, "train")), [gradient(i) for i in range(66)]
    )


def test_find_dataset_takes_the_newest_whole_version(tmp_path):
    for version in ("1.9.0", "1.10.0", "incomplete.77", "2.0.0"):
        (tmp_path / "toy" / "32" / version).mkdir(parents=True)
        (tmp_path / "toy" / "32" / version / "dataset_info.json").write_text("{}")
    (tmp_path / "toy" / "32" / "2.0.0" / "dataset_info.json").unlink()  # not whole
    assert reading.find_dataset(tmp_path, name="toy", resolution=32).name == "1.10.0"
    with pytest.raises(UserError, match=r"config\.data\.resolution=64: .* at 32: use config\.data\.resolution=32"):
        reading.find_dataset(tmp_path, name="toy", resolution=64)


def test_damaged_datasets_are_named(prepared, tmp_path):
    copy = tmp_path / "toy" / "32" / "1.0.0"
    shutil.copytree(prepared.directory, copy)
    with pytest.raises(UserError, match="no split 'test': its splits are: train, validation"):
        reading.read_attributes(copy, "test", ["age"])
    next(copy.glob("*train.array_record*")).unlink()
    with pytest.raises(UserError, match="'train' cannot be read"):
        list(reading.read_images(copy, "train"))
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="is not a readable dataset"):
        reading.split_sizes(copy)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")

    def peak_bytes(images: int) -> int:
        members = [types.SourceImage(f"{i}.png", tmp_path / "a.png") for i in range(images)]
        layout = types.Layout(kind="folder", source="s", splits={"train": members})
        tracemalloc.start()
        try:
            builder.prepare_dataset(layout, data_dir=tmp_path, name=f"n{images}", resolution=64, workers=2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10)  # imports
    few, many = peak_bytes(200), peak_bytes(800)
    assert many - few < 600 * 64 * 64 * 3 / 4  # all 800 are in one shard


def test_work_in_threads_ends_with_the_first_failure():
    seen = []

    def fail_at_five(number: int) -> int:
        seen.append(number)
        if number == 5:
            raise UserError("five")
        return number * number

    results = map_in_order(fail_at_five, range(1000), threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="five"):
        next(results)
    assert max(seen) < 20
