import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.data.store import open_store

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)


def make_source(blocks=(IMAGES[:7], IMAGES[7:])):
    """Gives the images in two blocks and counts how often it was asked."""
    return Mock(side_effect=lambda: iter(blocks))


def open_(path, source, images=10):
    return open_store(path, (images, 4), source, verb="making")


def test_a_store_is_made_once_and_memory_mapped(tmp_path):
    source = make_source()
    for _ in range(2):
        store = open_(tmp_path / "train.npy", source)
        assert isinstance(store, np.memmap)
        np.testing.assert_array_equal(store, IMAGES)
    assert source.call_count == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.json", "train.lock", "train.npy"]


def test_of_several_that_need_a_store_one_makes_it_and_the_others_wait(tmp_path):
    source = make_source()

    def slow():
        for block in source():
            time.sleep(0.2)
            yield block

    with ThreadPoolExecutor(3) as pool:
        for store in pool.map(lambda _: open_(tmp_path / "train.npy", slow), range(3)):
            np.testing.assert_array_equal(store, IMAGES)
    assert source.call_count == 1


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("train.npy", lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        ("train.npy", lambda data: data[:-5]),
        ("train.json", lambda data: b"{"),
    ],
)
def test_a_damaged_store_is_refused_by_name_until_it_is_deleted(tmp_path, name, damaged):
    source, path = make_source(), tmp_path / "train.npy"
    open_(path, source)
    (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes()))
    for _ in range(2):  # being refused once must not make it good
        with pytest.raises(UserError, match=r"train\.npy is damaged.*delete it"):
            open_(path, source)
    assert source.call_count == 1
    path.unlink()
    np.testing.assert_array_equal(open_(path, source), IMAGES)


def test_a_store_without_record_or_of_another_shape_is_made_again(tmp_path):
    source, path = make_source(), tmp_path / "train.npy"
    open_(path, source)
    path.with_suffix(".json").unlink()  # killed between the two
    np.testing.assert_array_equal(open_(path, source), IMAGES)
    assert source.call_count == 2
    shorter = make_source((IMAGES[:7],))
    np.testing.assert_array_equal(open_(path, shorter, images=7), IMAGES[:7])


def test_a_copied_store_is_taken_after_its_bytes_were_checked(tmp_path):
    source, path = make_source(), tmp_path / "train.npy"
    open_(path, source)
    os.utime(path, ns=(1, 1))
    open_(path, source)
    assert source.call_count == 1
    assert json.loads(path.with_suffix(".json").read_text())["modified_ns"] == 1


def test_a_store_cut_short_is_never_taken_for_whole(tmp_path):
    def dies():
        yield IMAGES[:7]
        raise KeyboardInterrupt

    path = tmp_path / "train.npy"
    with pytest.raises(KeyboardInterrupt):
        open_(path, dies)
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]
    np.testing.assert_array_equal(open_(path, make_source()), IMAGES)


def test_missing_images_are_reported(tmp_path):
    with pytest.raises(UserError, match="needs 10 images, not 7"):
        open_(tmp_path / "train.npy", make_source((IMAGES[:7],)))
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]
