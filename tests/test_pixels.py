import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from facevae_jax.config import DataConfig
from facevae_jax.data import builder, layouts, synthetic
from facevae_jax.data.pixels import SYNTHETIC_VALIDATION_START, open_split, open_splits, open_store
from facevae_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)


class Source:
    """Gives the images in two blocks and counts how often it was asked."""

    def __init__(self, blocks=(IMAGES[:7], IMAGES[7:])):
        self.blocks, self.asked = blocks, 0

    def __call__(self):
        self.asked += 1
        return iter(self.blocks)


def open_(path, source, images=10):
    return open_store(path, (images, 4), source, verb="making")


def test_a_store_is_made_once_and_memory_mapped(tmp_path):
    source = Source()
    for _ in range(2):
        store = open_(tmp_path / "train.npy", source)
        assert isinstance(store, np.memmap)
        np.testing.assert_array_equal(store, IMAGES)
    assert source.asked == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.json", "train.lock", "train.npy"]


def test_of_several_that_need_a_store_one_makes_it_and_the_others_wait(tmp_path):
    source = Source()

    def slow():
        for block in source():
            time.sleep(0.2)
            yield block

    with ThreadPoolExecutor(3) as pool:
        for store in pool.map(lambda _: open_(tmp_path / "train.npy", slow), range(3)):
            np.testing.assert_array_equal(store, IMAGES)
    assert source.asked == 1


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def break_record(path):
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [flip_byte, truncate, break_record])
def test_a_damaged_store_is_refused_by_name_until_it_is_deleted(tmp_path, damage):
    source, path = Source(), tmp_path / "train.npy"
    open_(path, source)
    damage(path)
    for _ in range(2):  # being refused once must not make it good
        with pytest.raises(UserError, match=r"train\.npy is damaged.*delete it") as caught:
            open_(path, source)
        assert "\n" not in str(caught.value)
    assert source.asked == 1
    path.unlink()
    np.testing.assert_array_equal(open_(path, source), IMAGES)


def test_a_store_without_record_or_of_another_shape_is_made_anew(tmp_path):
    source, path = Source(), tmp_path / "train.npy"
    open_(path, source)
    path.with_suffix(".json").unlink()  # killed between the two
    np.testing.assert_array_equal(open_(path, source), IMAGES)
    assert source.asked == 2
    shorter = Source((IMAGES[:7],))
    np.testing.assert_array_equal(open_(path, shorter, images=7), IMAGES[:7])


def test_a_copied_store_is_taken_after_its_bytes_were_checked(tmp_path):
    source, path = Source(), tmp_path / "train.npy"
    open_(path, source)
    os.utime(path, ns=(1, 1))
    open_(path, source)
    assert source.asked == 1
    assert json.loads(path.with_suffix(".json").read_text())["modified_ns"] == 1


def test_a_store_cut_short_is_never_taken_for_whole(tmp_path):
    def dies():
        yield IMAGES[:7]
        raise KeyboardInterrupt

    path = tmp_path / "train.npy"
    with pytest.raises(KeyboardInterrupt):
        open_(path, dies)
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]
    np.testing.assert_array_equal(open_(path, Source()), IMAGES)


def test_missing_images_are_reported(tmp_path):
    with pytest.raises(UserError, match="needs 10 images, but the dataset gave 7"):
        open_(tmp_path / "train.npy", Source((IMAGES[:7],)))
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]


def test_synthetic_splits_are_drawn_by_index_and_disjoint(tmp_path):
    config = DataConfig(
        data_dir=str(tmp_path), resolution=32, synthetic_train_images=300, synthetic_validation_images=3
    )
    splits = open_splits(config)
    assert splits.evaluation_split == "validation"
    np.testing.assert_array_equal(splits.train[257:259], synthetic.faces(np.array([257, 258]), resolution=32))
    start = SYNTHETIC_VALIDATION_START
    np.testing.assert_array_equal(splits.evaluation, synthetic.faces(np.arange(start, start + 3), resolution=32))


def test_drawn_faces_of_a_run_in_a_bucket_are_in_the_cache(tmp_path):
    sizes = {"synthetic_train_images": 2, "synthetic_validation_images": 1}
    config = DataConfig(data_dir="gs://bucket/data", cache_dir=str(tmp_path), resolution=32, **sizes)
    assert open_splits(config).train.shape == (2, 32, 32, 3)
    assert list(tmp_path.glob("synthetic/32/*/train-2.npy"))


def test_a_split_that_no_run_reads_is_there_for_evaluation(tmp_path):
    faces = synthetic.faces(np.arange(6), resolution=32)
    images = []
    for number, face in enumerate(faces):
        path = tmp_path / f"{number}.png"
        Image.fromarray(face).save(path)
        images.append(layouts.SourceImage(path.name, path, ()))
    splits = {"train": images[:3], "validation": images[3:4], "test": images[4:]}
    layout = layouts.Layout(kind="folder", source="source", splits=splits, attributes=())
    builder.prepare_dataset(layout, data_dir=tmp_path / "data", name="toy", resolution=32, workers=1)
    config = DataConfig(name="toy", resolution=32, data_dir=str(tmp_path / "data"))
    np.testing.assert_array_equal(open_split(config, "test"), faces[4:])
    np.testing.assert_array_equal(open_splits(config).evaluation, faces[3:4])
    with pytest.raises(UserError, match="--split='extra': the data have test and train and validation alone"):
        open_split(config, "extra")
    with pytest.raises(UserError, match="--split='test': the data have train and validation alone"):
        open_split(DataConfig(data_dir=str(tmp_path)), "test")
