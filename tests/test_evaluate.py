"""`python -m facevae_jax.evaluate`: exact on ragged splits, on any number of devices, and printed as a table."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.plan import BatchPlan
from facevae_jax.inference import Inference
from facevae_jax.metrics import comparison, recalibration, scores
from facevae_jax.metrics.frechet import frechet_distance
from facevae_jax.metrics.images import image_scores
from facevae_jax.models.convolution import convolution
from tests.conftest import run_module
from tests.scattered import scattered_model


@pytest.fixture(scope="module")
def record(trained):
    return scores.evaluate(trained, draws=(1, 4, 8), bound_images=5, priors=("standard", "gaussian"))


def test_figures_are_means_over_every_image_once(trained, tiny_config, record):
    pixels = np.asarray(trained.dataset.images("validation"))
    assert record["images"] == len(pixels) == 37
    posterior = trained.encode(pixels)
    decoded = jax.jit(lambda z: trained.module.apply(trained.variables, z, method="decode").mean)(posterior.mean)
    expected = image_scores(jnp.asarray(pixels.astype(np.float32) / 255), decoded)
    for name, values in expected._asdict().items():
        assert record["reconstruction"][name] == pytest.approx(float(np.mean(values)), rel=1e-5)
    kl = 0.5 * (posterior.mean**2 + np.exp(posterior.log_variance) - 1 - posterior.log_variance)
    assert record["likelihood"]["rate"] == pytest.approx(kl.sum(axis=1).mean(), rel=1e-5)
    assert record["latents"]["kl_by_dimension"] == pytest.approx(kl.mean(axis=0).tolist(), rel=1e-4)
    nats = record["likelihood"]
    assert nats["negative_elbo"] == pytest.approx(nats["distortion"] + nats["rate"])
    assert nats["variance"] == pytest.approx(32 * 32 * 3 / (2 * tiny_config.objective.r_loss_factor))
    # The same draw's error, from the distortion of the run's own variance.
    size, of = 32 * 32 * 3, nats["variance"]
    error = (2 * nats["distortion"] / size - np.log(2 * np.pi * of)) * of
    assert nats["best_variance"] == pytest.approx(error, rel=1e-3)
    best = 0.5 * size * (np.log(2 * np.pi * error) + 1)
    assert nats["negative_elbo_at_best_variance"] == pytest.approx(best + nats["rate"], rel=1e-3)
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"]))
    assert list(record["rates"]) == ["standard", "gaussian"]


def test_neither_batches_nor_devices_matter(trained, record, monkeypatch):
    alone = Inference(trained.module, jax.device_get(trained.variables), batch_size=5)
    monkeypatch.setattr(trained, "inference", alone)
    other = scores.evaluate(trained, draws=(1, 4, 8), bound_images=5, priors=("standard", "gaussian"))
    flat, flat_other = (jax.tree.leaves(tree) for tree in (record, other))
    numbers = [i for i, value in enumerate(flat) if not isinstance(value, str)]
    assert [flat[i] for i in numbers] == pytest.approx([flat_other[i] for i in numbers], rel=1e-4, abs=1e-6)


def red(images):
    """Features: the mean of each color."""
    return images.mean(axis=(1, 2))


def test_samples_against_real_faces_by_any_features(trained):
    found = comparison.sample_distances(trained, "validation", extract=red, prior="standard", count=20)
    assert (found["images"], found["features"], found["prior"]) == (20, 3, "standard")
    assert found["sample_frechet"] > 0
    assert found["interpolation_length"] >= 1
    assert found["interpolation_largest_step"] >= 1
    means = trained.encode(np.asarray(trained.dataset.images("validation")[:20])).mean
    halfway = red(trained.decode((means + np.roll(means, -1, axis=0)) / 2))
    real = red(np.asarray(trained.dataset.images("validation")[:20]))
    assert found["interpolation_frechet"] == pytest.approx(frechet_distance(halfway, real), rel=1e-3)
    made = red(np.concatenate(list(trained.sample_stream(20))))
    np.testing.assert_allclose(made, red(trained.sample(20)), atol=1)


def test_recalibrated_statistics_are_those_of_batches_without_dropout(tiny_config):
    """Those of the first layer, whose input depends on nothing else, are the moments of all images that it saw."""
    model = scattered_model(tiny_config)
    pixels = np.asarray(open_dataset(tiny_config.data).images("train"))
    found = recalibration.recalibrated(model).variables["batch_stats"]
    assert jax.tree.structure(found) == jax.tree.structure(model.variables["batch_stats"])
    rows = BatchPlan(tiny_config.train.seed, len(pixels), tiny_config.train.batch_size).rows(0, 10)
    layer = model.variables["params"]["encoder"]["StridedConvolution_0"]
    seen = convolution(jnp.asarray(pixels[rows.ravel()] / np.float32(255)), layer["kernel"], stride=2, form="plain")
    statistics = found["encoder"]["Stage_0"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], np.mean(seen, axis=(0, 1, 2)) + layer["bias"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], np.var(seen, axis=(0, 1, 2)), rtol=1e-3, atol=1e-7)


def test_samples_at_a_temperature_of_zero_are_the_face_of_the_mean(trained):
    given = {"extract": red, "prior": "standard", "count": 20, "temperature": 0.0}
    found = comparison.sample_distances(trained, "validation", **given)
    face = red(trained.decode(np.zeros((1, trained.code_size))))
    real = red(np.asarray(trained.dataset.images("validation")[:20]))
    assert found["sample_frechet"] == pytest.approx(frechet_distance(np.repeat(face, 20, axis=0), real), rel=1e-3)


@pytest.mark.slow
def test_features_that_fail_are_found_before_images_are_scored(workdir):
    result = run_module("facevae_jax.evaluate", f"--workdir={workdir}", "--features=tests.test_evaluate:flat")
    assert result.returncode == 2
    assert "--features returned shape" in result.stderr
    assert not result.stdout


def flat(images):
    """No row for each image."""
    return images.ravel()


@pytest.mark.slow
def test_the_command(workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    flags = ["--prior=standard", "--importance_samples=1,2", "--features=tests.test_evaluate:red", "--samples=30"]
    result = run_module("facevae_jax.evaluate", f"--workdir={run}", "--recalibrate", *flags)
    assert result.returncode == 0, result.stderr
    record = json.loads((run / "evaluation_validation.json").read_text())
    assert (record["step"], record["features"]["images"], record["recalibrated"]) == (20, 30, True)
    for name in ("SSIM", "Bound, K = 2", "Active units", "sample frechet"):
        assert f"\n  {name} " in result.stdout
