"""What is fitted to a model and kept: it belongs to the model and to the content of its data."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import facevae_jax
from facevae_jax.core.errors import UserError
from facevae_jax.exporting import publishing
from facevae_jax.latents.moments import moments_of
from facevae_jax.latents.priors import flow_fit, mixture
from facevae_jax.latents.priors.gaussian import GaussianPrior
from facevae_jax.trained import codes, directions
from facevae_jax.trained.artifacts import DIRECTORY, ArtifactStore
from facevae_jax.trained.loading import load
from tests.conftest import assert_same_trees, change
from tests.scattered import random_model

NAME, ARRAYS, FACTS = "prior-mixture", {"x": np.arange(3.0)}, {"images": 3}


def missing() -> str:
    raise UserError("the data are not on this machine")


def open_store(folder, *, model="step-1", data="first"):
    return ArtifactStore(folder, model=lambda: model, data=missing if data is None else lambda: data)


def test_what_is_put_is_read_back(tmp_path):
    for name in (NAME, "direction-mean-a/b+ü", "x" * 300, "x" * 299 + "y"):
        open_store(tmp_path).put(name, ARRAYS | {"name": np.array(name)}, FACTS)
        found = open_store(tmp_path).get(name)
        np.testing.assert_array_equal(found.arrays["x"], ARRAYS["x"])
        assert (str(found.arrays["name"]), found.facts) == (name, FACTS)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


@pytest.mark.parametrize("other", [{"model": "step-2"}, {"data": "second"}])
def test_another_model_or_other_data_never_meet_it(tmp_path, other):
    open_store(tmp_path).put(NAME, ARRAYS)
    assert open_store(tmp_path, **other).get(NAME) is None


def test_without_the_data_the_newest_of_the_model_is_read(tmp_path):
    for number, data in enumerate(("first", "second", "third")):
        open_store(tmp_path, data=data).put(NAME, {"x": np.array(number)})
    open_store(tmp_path, model="step-2").put(NAME, {"x": np.array(-1)})
    newest = [path for path in tmp_path.rglob("*.npz") if np.load(path)["x"] == 1]
    os.utime(*newest, times=(4e9, 4e9))
    alone = open_store(tmp_path, data=None)
    assert alone.get(NAME).arrays["x"] == 1
    newest[0].write_bytes(b"damaged")
    os.utime(*newest, times=(4e9, 4e9))
    assert alone.get(NAME).arrays["x"] in (0, 2)
    alone.put(NAME, {"x": np.array(5)})  # nobody knows of which data
    assert alone.get(NAME).arrays["x"] in (0, 2)


def test_damaged_and_foreign_files_are_not_read(tmp_path):
    store = open_store(tmp_path)
    store.put(NAME, ARRAYS)
    store.put("moments", ARRAYS)
    (path,) = tmp_path.rglob(f"{NAME}-*.npz")
    (other,) = tmp_path.rglob("moments-*.npz")
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no archive", other.read_bytes()):
        path.write_bytes(content)
        assert store.get(NAME) is None
    for arrays in (ARRAYS, {"facts": np.array("{"), **ARRAYS}, {"facts": np.array("[]")}):
        np.savez(path, **arrays)
        assert store.get(NAME) is None
    np.savez(path, facts=np.array('{"format": 1, "name": "prior-mixture"}'), x=np.array([{}]))  # a pickle
    assert store.get(NAME) is None
    path.write_bytes(whole)
    np.testing.assert_array_equal(store.get(NAME).arrays["x"], ARRAYS["x"])


def test_a_folder_that_cannot_be_written_costs_time_only(tiny_config, tmp_path):
    (tmp_path / DIRECTORY).write_text("a file where the folder would be")
    trained = random_model(tiny_config, tmp_path)
    np.testing.assert_array_equal(trained.sample(2), trained.sample(2))
    assert (tmp_path / DIRECTORY).is_file()


def prepare(folder, brightness):
    """Prepares images of one mean brightness under one name."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir()
    random = np.random.default_rng(brightness)
    for number in range(25):
        pixels = random.integers(brightness - 40, brightness + 40, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    made = {"layout": "folder", "resolution": 32, "data_dir": folder / "data", "name": "mine", "overwrite": True}
    facevae_jax.prepare(folder / "images", **made, workers=1)


def test_data_prepared_anew_never_meet_what_was_fitted_to_the_old(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "COMPONENTS", (1,))
    monkeypatch.setattr(mixture, "MIN_DRAWS", 100)

    config = change(tiny_config, data={"name": "mine", "data_dir": str(tmp_path / "data")})

    def fitted(brightness):
        prepare(tmp_path, brightness)
        trained = random_model(config, tmp_path)
        posterior = trained.codes.posterior("train")
        images = trained.dataset.images("train")
        np.testing.assert_allclose(posterior.mean, trained.encode(np.asarray(images)).mean, atol=1e-5)
        return posterior.mean, trained.moments.mean, np.asarray(trained.prior("mixture").components.mean)

    old = fitted(60)
    assert_same_trees(fitted(60), old)
    new = fitted(180)
    assert not any(np.allclose(a, b, atol=1e-3) for a, b in zip(old, new, strict=True))
    shutil.rmtree(config.data.data_dir)
    lost = random_model(config, tmp_path)
    assert_same_trees((lost.moments.mean, np.asarray(lost.prior("mixture").components.mean)), new[1:])
    assert lost.sample(3).shape == (3, 32, 32, 3)
    assert lost.available_priors() == ["standard", "gaussian", "mixture"]
    with pytest.raises(UserError, match="mine"):
        lost.codes.posterior("train")


def test_without_data_and_moments_only_the_standard_prior_is_there(tiny_config, tmp_path):
    config = change(tiny_config, data={"name": "lost", "data_dir": str(tmp_path)})
    trained = random_model(config, tmp_path / "run")
    assert trained.available_priors() == ["standard"]
    assert trained.sample(2, prior="standard").shape == (2, 32, 32, 3)
    with pytest.raises(UserError, match="lost"):
        trained.sample(2)


def test_gaussian_samples_use_the_moments_of_the_training_split(trained):
    train, evaluation = (np.asarray(trained.dataset.images(split)) for split in ("train", "validation"))
    expected, other = (moments_of(*trained.encode(images)) for images in (train, evaluation))
    assert trained.moments.images == len(train)
    np.testing.assert_allclose(trained.moments.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained.moments.covariance, expected.covariance, rtol=1e-4, atol=1e-5)
    drawn = trained.sample_codes(50, prior="gaussian")
    np.testing.assert_allclose(drawn, trained.sample_codes(50, prior=GaussianPrior.of(expected)), rtol=1e-3, atol=1e-3)
    assert np.abs(drawn - trained.sample_codes(50, prior=GaussianPrior.of(other))).max() > 0.01


def test_a_prior_that_takes_long_to_fit_is_fitted_once(trained, workdir, monkeypatch):
    monkeypatch.setattr(mixture, "COMPONENTS", (1,))
    monkeypatch.setattr(mixture, "MIN_DRAWS", 500)
    first = trained.sample_codes(5, prior="mixture")
    (path,) = workdir.rglob("prior-mixture-*.npz")
    kept = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(type(trained.codes), "draws", None)  # what fitting needs
        np.testing.assert_array_equal(trained.sample_codes(5, prior="mixture"), first)
    path.write_bytes(kept[: len(kept) // 2])
    np.testing.assert_allclose(trained.sample_codes(5, prior="mixture"), first, atol=1e-4)
    assert len(path.read_bytes()) == len(kept)


@pytest.mark.slow
def test_the_learned_prior_is_the_default_and_is_read_without_the_data(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(flow_fit, "STEPS", (50, 50))
    copied = shutil.copytree(finished[0], tmp_path / "run")
    trained = load(copied)
    assert not trained.keep_artifacts(training_seconds=10.0)
    assert not list(copied.rglob("*flow*"))  # not even begun: a tenth of that does not compile it
    assert not trained.fit_default_prior(seconds=0.0)
    assert [path.name.partition("-")[0] for path in copied.rglob("*flow*")] == ["unfinished"]
    faces = trained.sample(5)
    np.testing.assert_array_equal(trained.sample(5, prior="flow"), faces)
    assert [path.name.partition("-")[0] for path in copied.rglob("*flow*")] == ["prior"]
    assert trained.available_priors()[-1] == "flow"
    assert trained.keep_artifacts(training_seconds=0.0)  # fitted already
    exported = tmp_path / "exported"
    publishing.export(trained.portable(), exported, onnx=False)
    trained.artifacts.copy("prior-flow", exported)
    lost = load(exported)
    monkeypatch.setattr(type(lost.dataset), "images", refuse)
    monkeypatch.setattr(type(lost.dataset), "fingerprint", property(refuse))
    np.testing.assert_array_equal(lost.sample(5), faces)
    shutil.rmtree(exported / "artifacts")
    assert load(exported).default_prior == "gaussian"


def refuse(*_):
    raise UserError("the data are not here")


def test_encoded_splits_and_directions_are_kept(trained, monkeypatch):
    options = {"method": "regression", "keep": ("smile", "turn")}
    posterior, direction = trained.codes.posterior("train"), directions.direction_of(trained, "glasses", **options)
    assert sum(direction.counts) == 165
    with monkeypatch.context() as patched:
        patched.setattr(codes, "encode_all", None)
        patched.setattr(directions, "fit_direction", None)
        assert_same_trees(tuple(trained.codes.posterior("train")), tuple(posterior))
        again = directions.direction_of(trained, "glasses", **options)
    np.testing.assert_array_equal(again.vector, direction.vector)
    assert again._replace(vector=None) == direction._replace(vector=None)
