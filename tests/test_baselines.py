"""PCA and the autoencoder, by the same trainer; and a linear VAE against its optimum."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

import facevae_jax
from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.batches import Chunk
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.plan import BatchPlan
from facevae_jax.metrics import scores
from facevae_jax.models import pca, vae
from facevae_jax.models.api import Execution, image_keys
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.loop import train
from facevae_jax.training.optimizer import make_optimizer
from facevae_jax.training.setup import DATA_AXIS, TrainSetup, create_state, make_mesh
from facevae_jax.training.step import train_steps
from tests.conftest import change
from tests.test_extending import example


@pytest.fixture(scope="module")
def fitted(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pca") / "run"
    config = RunConfig(data=tiny_config.data, model=pca.Config(latent_dim=10), train=TrainConfig(batch_size=16))
    train(config, workdir)
    return config, workdir, facevae_jax.load(workdir)


def test_principal_components_equal_scikit_learns(fitted):
    _, _, trained = fitted
    pixels = [trained.dataset.images(split) for split in ("train", "validation")]
    images, held_out = (np.asarray(x).reshape(len(x), -1) / 255 for x in pixels)
    reference = PCA(10, svd_solver="full").fit(images)
    params = trained.variables["params"]
    np.testing.assert_allclose(params["mean"], reference.mean_, atol=1e-6)
    deviations = reference.singular_values_ / math.sqrt(len(images))
    np.testing.assert_allclose(params["deviations"], deviations, rtol=1e-4)
    # Signs are free.
    aligned = np.abs(np.sum(np.asarray(params["components"]) * reference.components_, axis=1))
    np.testing.assert_allclose(aligned, 1, atol=1e-3)
    expected = reference.inverse_transform(reference.transform(held_out)).clip(0, 1)
    record = scores.evaluate(trained)
    assert record["reconstruction"]["mse"] == pytest.approx(np.mean((expected - held_out) ** 2), rel=1e-3)
    assert "likelihood" not in record  # a point has no ELBO
    np.testing.assert_allclose(trained.encode(pixels[0]).mean.std(axis=0), 1, rtol=1e-3)


def test_batches_of_pca_do_not_matter_where_its_components_suffice(monkeypatch):
    random = np.random.default_rng(0)
    low_rank = random.normal(size=(70, 5)) * [16, 12, 8, 6, 4] @ np.linalg.qr(random.normal(size=(192, 5)))[0].T
    images = np.round(128 + 8 * low_rank).clip(0, 255).astype(np.uint8).reshape(70, 8, 8, 3)
    whole = pca.fit(pca.Config(latent_dim=5), images)
    monkeypatch.setattr(pca, "BATCH", 16)
    parts = pca.fit(pca.Config(latent_dim=5), images)
    np.testing.assert_allclose(parts["mean"], whole["mean"], atol=1e-6)
    np.testing.assert_allclose(parts["deviations"], whole["deviations"], rtol=2e-3)
    np.testing.assert_allclose(np.abs(np.sum(parts["components"] * whole["components"], axis=1)), 1, atol=2e-3)
    with pytest.raises(UserError, match=r"latent_dim=70.* at most 69"):
        pca.fit(pca.Config(latent_dim=70), images)


def test_a_fitted_pca_is_a_model_like_any_other(fitted, capsys):
    config, workdir, trained = fitted
    assert trained.step == 1
    assert (workdir / "pictures" / "samples_standard_00000001.png").exists()
    assert trained.sample(3).shape == (3, 32, 32, 3)
    train(config, workdir)
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.slow
def test_an_autoencoder_draws_nothing_and_pays_no_kl(tiny_config, tmp_path):
    config = change(tiny_config, model={"kind": "autoencoder"})
    state = train(config, tmp_path)
    trained = facevae_jax.load(tmp_path)
    images = jnp.asarray(open_dataset(config.data).images("validation"))

    @jax.jit
    def reconstruct(keys):
        return trained.module.apply(trained.variables, images, keys, train=False).decoded.mean

    np.testing.assert_array_equal(*(reconstruct(image_keys(jax.random.key(seed), 37)) for seed in (0, 1)))
    assert "log_variance" not in state.params["encoder"]
    record = scores.evaluate(trained)
    assert "likelihood" not in record
    assert record["reconstruction"]["mse"] < 0.1
    assert trained.sample(3).shape == (3, 32, 32, 3)


def test_a_setting_of_another_kind_is_refused_by_name():
    settings = RunConfig(model=vae.Config(filters=(8, 16))).to_dict()
    settings["model"]["kind"] = "pca"
    with pytest.raises(ValueError, match=r"config\.model\.filters=\(8, 16\).*pca"):
        RunConfig.from_config_dict(settings)
    settings["model"] = RunConfig().to_dict()["model"] | {"kind": "pca"}  # the others' defaults are nobody's wish
    assert RunConfig.from_config_dict(settings).model == pca.Config()


class LinearGaussian(GaussianLikelihood):
    def decode(self, raw):
        return Decoded(raw)


@pytest.mark.slow
def test_a_linear_vae_reaches_the_likelihood_of_probabilistic_pca(monkeypatch):
    """The example's best ELBO is the likelihood of pPCA (Lucas et al. 2019), at Tipping & Bishop's variance (eq. 8)."""
    linear, generator = example("A model", monkeypatch), np.random.default_rng(0)
    images, latent_dim, shape = 2_048, 3, (2, 2, 3)
    size = math.prod(shape)
    weight = generator.normal(size=(size, latent_dim)) * [0.5, 0.35, 0.25]
    data = generator.normal(size=(images, latent_dim)) @ weight.T + 0.3 * generator.normal(size=(images, size)) + 0.5
    data = data.astype(np.float32)
    config = RunConfig(
        data=DataConfig(name="linear"),
        model=linear.Config(latent_dim=latent_dim),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=256, steps=8_000, learning_rate=1e-2, schedule="cosine"),
    )
    mesh = make_mesh(jax.local_devices()[:1])
    optimizer = make_optimizer(config.train, total_steps=8_000)
    likelihood = LinearGaussian(size)
    model, execution = linear.Linear(config.model, 2, likelihood), Execution(axis=DATA_AXIS)
    setup = TrainSetup(config, model, likelihood, optimizer, mesh, execution)
    state = create_state(setup)
    shaped = data.reshape(-1, *shape)
    steps = jax.jit(functools.partial(train_steps, setup=setup, capacity=500))
    plan, pixels = BatchPlan(0, images, 256), jnp.asarray(data.reshape(images, 1, size))
    for at in range(0, 8_000, 500):
        state, _ = steps(state, Chunk(pixels, jnp.asarray(plan.rows(at, 500))), jnp.int32(500))
    # Eight draws for each image: that of one alone is known to about 1%.
    loss = Evaluator(setup, np.tile(shaped, (8, 1, 1, 1)))(state).loss

    values = np.linalg.eigvalsh(np.cov(data.T.astype(np.float64), bias=True))[::-1]
    variance = values[latent_dim:].mean()
    optimum = -0.5 * (
        size * math.log(2 * math.pi)
        + np.log(values[:latent_dim]).sum()
        + (size - latent_dim) * math.log(variance)
        + size
    )
    assert float(loss.variance) == pytest.approx(variance, rel=0.03)
    assert -float(loss.negative_elbo) == pytest.approx(optimum, rel=0.01)
    assert float(loss.negative_elbo) > -optimum - 0.02  # a bound, but for the noise of the draws
