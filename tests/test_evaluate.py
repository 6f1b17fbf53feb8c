"""`python -m facevae_jax.evaluate`: exact on ragged splits, on any number of devices, and told in words."""

import json

import jax
import numpy as np
import pytest
import scipy.optimize

from facevae_jax.data.pixels import open_splits
from facevae_jax.data.plan import BatchPlan
from facevae_jax.files import write_json
from facevae_jax.metrics import comparison, recalibration, scores
from facevae_jax.metrics.frechet import frechet_distance
from facevae_jax.metrics.images import image_scores
from facevae_jax.models.convolution import strided_convolution
from facevae_jax.models.inference import Inference
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.state import make_model
from tests.conftest import assert_one_line_error, run_module
from tests.explored import random_model, random_state


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    return random_model(tiny_config, tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def record(trained):
    return scores.evaluate(trained, draws=(1, 4, 8), bound_images=5, priors=("standard", "gaussian"))


def test_figures_are_means_over_every_image_once(trained, tiny_config, record):
    pixels = np.asarray(open_splits(tiny_config.data).evaluation)
    assert record["images"] == len(pixels) == 37
    posterior = trained.encode(pixels)
    decoded = jax.jit(lambda z: trained.module.apply(trained.variables, z, method="decode"))(posterior.mean)
    expected = image_scores(pixels.astype(np.float32) / 255, decoded)
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
    best = scipy.optimize.minimize_scalar(
        lambda v: 0.5 * size * (np.log(2 * np.pi * v) + error / v), bounds=(1e-4, 1), method="bounded"
    )
    assert nats["negative_elbo_at_best_variance"] == pytest.approx(best.fun + nats["rate"], rel=1e-3)
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"]))
    assert list(record["rates"]) == ["standard", "gaussian"]


def test_neither_batches_nor_devices_matter(trained, record):
    alone = Inference(trained.module, jax.device_get(trained.variables), batch_size=5)
    whole, trained.inference = trained.inference, alone
    try:
        other = scores.evaluate(trained, draws=(1, 4, 8), bound_images=5, priors=("standard", "gaussian"))
    finally:
        trained.inference = whole
    flat, flat_other = (jax.tree.leaves(tree) for tree in (record, other))
    numbers = [i for i, value in enumerate(flat) if not isinstance(value, str)]
    assert [flat[i] for i in numbers] == pytest.approx([flat_other[i] for i in numbers], rel=1e-4, abs=1e-6)


def test_the_bound_of_one_draw_is_the_elbo_of_those_images(trained, record):
    bounds = list(record["importance"]["bounds"].values())
    assert record["importance"]["images"] == 5
    assert sorted(bounds, reverse=True) == bounds
    assert bounds[0] == pytest.approx(record["likelihood"]["negative_elbo"], rel=0.05)


def red(images):
    """Features: the mean of each colour."""
    return images.mean(axis=(1, 2))


def test_samples_against_real_faces_by_any_features(trained):
    found = comparison.sample_distances(trained, "validation", extract=red, prior="standard", count=20)
    assert (found["images"], found["features"], found["prior"]) == (20, 3, "standard")
    assert found["sample_frechet"] > 0
    assert found["interpolation_length"] >= 1
    assert found["interpolation_largest_step"] >= 1
    means = trained.encode(np.asarray(open_splits(trained.config.data).evaluation[:20])).mean
    halfway = red(trained.decode((means + np.roll(means, -1, axis=0)) / 2))
    real = red(np.asarray(open_splits(trained.config.data).evaluation[:20]))
    assert found["interpolation_frechet"] == pytest.approx(frechet_distance(halfway, real), rel=1e-3)
    made = red(np.concatenate(list(trained.sample_stream(20))))
    np.testing.assert_allclose(made, red(trained.sample(20)), atol=1)


def test_samples_come_from_a_gaussian_that_has_not_seen_the_images(trained):
    """Of training latents, where the one that a run keeps is of the split that is compared with."""
    prior = comparison.unseen_prior(trained, "gaussian", "validation")
    posterior = trained.encode(np.asarray(open_splits(trained.config.data).train))
    covariance = np.cov(posterior.mean.T, bias=True) + np.diag(np.exp(posterior.log_variance).mean(axis=0))
    np.testing.assert_allclose(prior.mean, posterior.mean.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(prior.root @ prior.root.T, covariance, rtol=1e-3, atol=1e-4)
    for name, split in (("standard", "validation"), ("gaussian", "train")):
        assert comparison.unseen_prior(trained, name, split) == name
    found = comparison.sample_distances(trained, "validation", extract=red, prior="gaussian", count=20)
    made = red(trained.sample(20, prior=prior))
    real = red(np.asarray(open_splits(trained.config.data).evaluation[:20]))
    assert found["sample_frechet"] == pytest.approx(frechet_distance(made, real), rel=0.02)


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    workdir.mkdir()
    write_json(workdir / "config.json", tiny_config.to_dict())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(random_state(tiny_config), step=3, loss=1.0)
    return workdir


def test_the_command(workdir):
    flags = ["--prior=standard", "--importance_samples=1,2", "--features=tests.test_evaluate:red", "--samples=30"]
    result = run_module("facevae_jax.evaluate", f"--workdir={workdir}", *flags)
    assert result.returncode == 0, result.stderr
    record = json.loads((workdir / "evaluation_validation.json").read_text())
    assert record["step"] == 3
    assert record["features"]["images"] == 30
    assert result.stdout.startswith("synthetic, validation split, 37 images at 32x32, step 3\n")
    for name in ("SSIM", "Bound, K = 2", "Active units", "sample frechet"):
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [
        (["--importance_samples=2,3"], "--importance_samples=2,3"),
        (["--importance_samples=x"], "--importance_samples"),
        (["--importance_samples=1,0"], "--importance_samples=1,0"),
        (["--features=./x.py:f"], "--features='./x.py:f'"),
        (["--json=/tmp"], "--json='/tmp' is a folder"),
        (["--features=nowhere"], "--features='nowhere'"),
        (["--inception_weights=/nowhere"], "--inception_weights"),
        (["--json=/proc/x/y.json"], "--json"),
    ],
)
def test_mistakes_are_told_in_one_line(workdir, flags, mentioned):
    assert_one_line_error(run_module("facevae_jax.evaluate", f"--workdir={workdir}", *flags), mentioned)


def test_recalibrated_statistics_are_those_of_batches_without_dropout(tiny_config):
    """Those of the first layer, whose input depends on nothing else, are the moments of all images that it saw."""
    state = random_state(tiny_config)
    restored = RestoredModel(
        tiny_config, make_model(tiny_config), state.evaluation_variables, state.latent_moments, None, step=0
    )
    pixels = np.asarray(open_splits(tiny_config.data).train)
    found = recalibration.batch_statistics(restored, pixels)
    assert jax.tree.structure(found) == jax.tree.structure(state.batch_stats)
    rows = BatchPlan(tiny_config.train.seed, len(pixels), tiny_config.train.batch_size).rows(0, 10)
    layer = state.params["encoder"]["StridedConvolution_0"]
    seen = strided_convolution(pixels[rows.ravel()] / np.float32(255), layer["kernel"], form="plain") + layer["bias"]
    statistics = found["encoder"]["Stage_0"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], np.mean(seen, axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], np.var(seen, axis=(0, 1, 2)), rtol=1e-3, atol=1e-7)


def test_recalibration_changes_what_is_scored(workdir, tmp_path):
    flags = ["--workdir", workdir, "--importance_samples=", "--prior=standard"]
    records = []
    for name, more in (("as_trained", []), ("recalibrated", ["--recalibrate"])):
        output = tmp_path / f"{name}.json"
        result = run_module("facevae_jax.evaluate", *flags, "--json", output, *more)
        assert result.returncode == 0, result.stderr
        records.append(json.loads(output.read_text()))
    assert [record["recalibrated"] for record in records] == [False, True]
    # A random model's running statistics are still 0 and 1.
    assert records[0]["reconstruction"]["mse"] != pytest.approx(records[1]["reconstruction"]["mse"], rel=1e-3)
