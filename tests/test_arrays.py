"""Training from arrays and other sequences that a program gives."""

import shutil

import jax
import numpy as np
import pytest

import facevae_jax
from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.arrays import GivenImages
from facevae_jax.data.dataset import open_dataset
from tests.conftest import assert_same_trees, change, run_module

FACES = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
OBJECTS = np.empty(len(FACES), object)
OBJECTS[:] = list(FACES)


def kept(directory, split="train"):
    return np.load(directory / "arrays" / f"{split}.npy")


class Labeled:
    """As a PyTorch dataset: one item an index, an image and a label."""

    def __len__(self):
        return len(FACES)

    def __getitem__(self, index):
        assert isinstance(index, int)
        return FACES[index], 7


@pytest.mark.parametrize("given", [FACES, jax.numpy.asarray(FACES), list(FACES), OBJECTS, Labeled()])
def test_a_tenth_of_any_sequence_of_images_is_for_validation(tmp_path, given):
    GivenImages(given, resolution=32).keep(tmp_path, replace=False)
    held_out = kept(tmp_path, "validation")
    assert 1 <= len(held_out) <= 10
    both = np.concatenate([kept(tmp_path), held_out])
    assert sorted(map(bytes, both)) == sorted(map(bytes, FACES))


def test_validation_images_are_those_given(tmp_path):
    GivenImages(FACES[:40], FACES[40:], resolution=32).keep(tmp_path, replace=False)
    np.testing.assert_array_equal(kept(tmp_path), FACES[:40])
    np.testing.assert_array_equal(kept(tmp_path, "validation"), FACES[40:])


def test_other_images_are_refused_and_replaced_only_when_asked(tmp_path):
    GivenImages(FACES, resolution=32).keep(tmp_path, replace=False)
    before = kept(tmp_path)
    GivenImages(FACES.copy(), resolution=32).keep(tmp_path, replace=False)  # the same
    for others in (255 - FACES, FACES[:-1]):
        with pytest.raises(UserError, match="accept_new_data"):
            GivenImages(others, resolution=32).keep(tmp_path, replace=False)
        np.testing.assert_array_equal(kept(tmp_path), before)
    GivenImages(255 - FACES, resolution=32).keep(tmp_path, replace=True)
    np.testing.assert_array_equal(kept(tmp_path), 255 - before)
    GivenImages(FACES[:1], resolution=32).keep(tmp_path, replace=True)
    assert not list(tmp_path.rglob("validation.npy"))  # of the images before


@pytest.mark.parametrize("damage", ["train.npy is gone", "no record", "an empty record", "a record of something else"])
def test_damaged_stores_are_made_again_from_the_same_images(tmp_path, damage):
    GivenImages(FACES, resolution=32).keep(tmp_path, replace=False)
    before = kept(tmp_path)
    path = tmp_path / "arrays" / "train.npy"
    if damage == "train.npy is gone":
        path.unlink()
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("" if "empty" in damage else "{}")
        with pytest.raises(UserError, match="give the run its images again"):
            _ = open_dataset(DataConfig(name="arrays", data_dir=str(tmp_path), resolution=32)).sizes
    GivenImages(FACES, resolution=32).keep(tmp_path, replace=False)
    np.testing.assert_array_equal(kept(tmp_path), before)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (FACES.astype(np.float32) / 255, r"images: number \d+ is float32 \[32, 32, 3\]: give uint8 \[N, 32, 32, 3\]"),
        (FACES[:, :16], r"images: number \d+ is uint8 \[16, 32, 3\]"),
        (FACES.transpose(0, 3, 1, 2), r"images: number \d+ is uint8 \[3, 32, 32\]"),
        (FACES[:0], "images: there are none"),
        (iter(FACES), "images: a .* has no length"),
        (np.array(3), "images: a ndarray has no length"),
        ("/tmp/faces", "images: a str has no rows"),
        ([FACES[0], FACES[1][:16]], r"images: number 1 is uint8 \[16, 32, 3\]"),
    ],
    ids=["float", "low", "channels first", "empty", "iterator", "scalar", "path", "ragged"],
)
def test_what_are_no_images_is_named(tmp_path, given, named):
    with pytest.raises(UserError, match=named):
        GivenImages(given, resolution=32).keep(tmp_path, replace=False)
    with pytest.raises(UserError, match=named.replace("images", "validation_images", 1)):
        GivenImages(FACES, given, resolution=32).keep(tmp_path / "other", replace=False)


@pytest.mark.slow
def test_a_run_on_arrays_is_like_that_on_the_same_dataset(tiny_config, finished, tmp_path):
    images = open_dataset(tiny_config.data)
    given = {"images": images.images("train"), "validation_images": images.images("validation")}
    plain = change(tiny_config, data={"name": "synthetic", "data_dir": "~/tensorflow_datasets"})
    model = facevae_jax.train(plain, tmp_path / "run", **given)
    assert_same_trees(model.variables, jax.device_get(finished[1].evaluation_variables))
    resumed = facevae_jax.train(plain, tmp_path / "run", **given)
    assert resumed.step == model.step == 20
    result = run_module(
        "facevae_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--importance_samples=1", "--prior=gaussian"
    )
    assert result.returncode == 0, result.stderr
    with pytest.raises(UserError, match="accept_new_data"):
        facevae_jax.train(plain, tmp_path / "run", images=255 - given["images"])
    # What is refused leaves the run its images.
    small = np.zeros((40, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="resolution was 32"):
        facevae_jax.train(change(plain, data={"resolution": 64}), tmp_path / "run", images=small, accept_new_data=True)
    with pytest.raises(UserError, match="put the images back"):
        facevae_jax.train(plain, tmp_path / "run", images=given["images"][:12], accept_new_data=True)
    facevae_jax.train(plain, tmp_path / "run", **given)
    shutil.rmtree(tmp_path / "run" / "data")
    assert facevae_jax.load(tmp_path / "run").sample(2).shape == (2, 32, 32, 3)  # what it needs is kept
    with pytest.raises(UserError, match="images=") as raised:
        facevae_jax.evaluate(facevae_jax.load(tmp_path / "run"))
    assert "\n" not in str(raised.value)
