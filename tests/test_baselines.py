"""PCA and the autoencoder, by the same trainer and with all that follows it; and a linear VAE against its optimum."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

import facevae_jax
from facevae_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.data.batches import ResidentFeed
from facevae_jax.data.pixels import open_splits
from facevae_jax.data.plan import BatchPlan
from facevae_jax.errors import UserError
from facevae_jax.metrics import scores
from facevae_jax.models.vae import Decoded, Execution, Output, Posterior
from facevae_jax.training import pca
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.loop import train
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import create_state, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps
from tests.conftest import change


@pytest.fixture(scope="module")
def fitted(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pca") / "run"
    config = change(tiny_config, model={"kind": "pca", "latent_dim": 10})
    train(config, workdir)
    return config, workdir, facevae_jax.load(workdir)


def test_principal_components_equal_scikit_learns(fitted):
    config, _, trained = fitted
    splits = open_splits(config.data)
    images, held_out = (np.asarray(x).reshape(len(x), -1) / 255 for x in (splits.train, splits.evaluation))
    reference = PCA(10, svd_solver="full").fit(images)
    np.testing.assert_allclose(trained.variables["params"]["mean"], reference.mean_, atol=1e-6)
    deviations = reference.singular_values_ / math.sqrt(len(images))
    np.testing.assert_allclose(trained.variables["params"]["deviations"], deviations, rtol=1e-4)
    # Signs are free.
    aligned = np.abs(np.sum(np.asarray(trained.variables["params"]["components"]) * reference.components_, axis=1))
    np.testing.assert_allclose(aligned, 1, atol=1e-3)
    expected = reference.inverse_transform(reference.transform(held_out)).clip(0, 1)
    assert scores.evaluate(trained, draws=())["reconstruction"]["mse"] == pytest.approx(
        np.mean((expected - held_out) ** 2), rel=1e-3
    )
    latents = trained.encode(np.asarray(splits.train)).mean
    np.testing.assert_allclose(latents.std(axis=0), 1, rtol=1e-3)


def test_batches_of_pca_do_not_matter(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)
    whole = pca.fit_pca(images, 5, seed=0)
    monkeypatch.setattr(pca, "BATCH", 16)
    parts = pca.fit_pca(images, 5, seed=0)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=2e-3)
    with pytest.raises(UserError, match=r"latent_dim=70: PCA of 70 images has at most 69"):
        pca.fit_pca(images, 70, seed=0)


def test_a_fitted_pca_is_a_model_like_any_other(fitted, capsys):
    config, workdir, trained = fitted
    assert trained.step == 1
    assert (workdir / "pictures" / "samples_standard_00000001.png").exists()
    shown = np.asarray(Image.open(workdir / "pictures" / "eigenfaces_00000001.png"))[:32]
    mean, component = shown[:, :32], shown[:, 34:66].astype(float) - 127.5
    np.testing.assert_allclose(mean, 255 * trained.variables["params"]["mean"].reshape(32, 32, 3), atol=1)
    first = np.asarray(trained.variables["params"]["components"])[0].reshape(32, 32, 3)
    np.testing.assert_allclose(component, 127.5 * first / np.abs(first).max(), atol=1)
    assert trained.sample(3, prior="gaussian").shape == (3, 32, 32, 3)
    assert "likelihood" not in scores.evaluate(trained)  # a point has no ELBO
    train(config, workdir)
    assert "nothing is left to do" in capsys.readouterr().out


def test_an_autoencoder_draws_nothing_and_pays_no_kl(tiny_config, tmp_path):
    config = change(tiny_config, model={"kind": "autoencoder"})
    assert config.objective.kl_weight == 0
    state = train(config, tmp_path)
    trained = facevae_jax.load(tmp_path)
    images = np.asarray(open_splits(config.data).evaluation)
    noise = np.random.default_rng(0).normal(size=(2, 37, 8)).astype(np.float32)
    apply = jax.jit(lambda noise: trained.module.apply(trained.variables, images, noise, train=False).reconstruction)
    np.testing.assert_allclose(*(apply(x) for x in noise), atol=2e-3)
    assert "log_variance" not in state.params["encoder"]
    record = scores.evaluate(trained)
    assert "likelihood" not in record
    assert record["reconstruction"]["mse"] < 0.1
    assert trained.sample(3, prior="gaussian").shape == (3, 32, 32, 3)


class LinearVAE(nn.Module):
    """The VAE of Lucas et al. 2019: linear encoder and decoder, one posterior variance a dimension."""

    latent_dim: int
    image_shape: tuple[int, int, int]
    execution: object = None

    def setup(self):
        size = math.prod(self.image_shape)
        self.mean = nn.Dense(self.latent_dim)
        self.log_variance = self.param("log_variance", nn.initializers.zeros, (self.latent_dim,))
        self.out = nn.Dense(size)

    def __call__(self, images, noise, *, train):
        posterior = self.encode(images)
        return Output(Decoded(self.decode(posterior.sample(noise))), posterior)

    def encode(self, images):
        mean = self.mean(images.reshape(images.shape[0], -1))
        return Posterior(mean, jax.numpy.broadcast_to(self.log_variance, mean.shape))

    def decode(self, latents):
        return self.out(latents).reshape(-1, *self.image_shape)


def test_a_linear_vae_reaches_the_likelihood_of_probabilistic_pca():
    """Its best ELBO is the likelihood of pPCA (Lucas et al. 2019), at the variance of Tipping & Bishop 1999, eq. 8."""
    generator = np.random.default_rng(0)
    images, latent_dim, shape = 2_048, 3, (2, 2, 3)
    size = math.prod(shape)
    weight = generator.normal(size=(size, latent_dim)) * [0.5, 0.35, 0.25]
    data = generator.normal(size=(images, latent_dim)) @ weight.T + 0.3 * generator.normal(size=(images, size)) + 0.5
    data = data.astype(np.float32)
    config = RunConfig(
        data=DataConfig(name="linear"),
        model=ModelConfig(latent_dim=latent_dim),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=256, steps=8_000, learning_rate=1e-2, schedule="cosine"),
    )
    mesh = make_mesh(jax.local_devices()[:1])
    trainer = Trainer(
        config, LinearVAE(latent_dim, shape, Execution("plain")), make_optimizer(config.train, total_steps=8_000)
    )
    state = create_state(config, trainer.model, trainer.optimizer, mesh)
    shaped = data.reshape(-1, *shape)
    feed = ResidentFeed(
        shaped,
        BatchPlan(0, images, 256),
        capacity=500,
        pixels_sharding=replicated(mesh),
        rows_sharding=split_along(mesh, 1),
    )
    compiled = compile_train_steps(trainer, state, feed.abstract_chunk(), capacity=500)
    for at in range(0, 8_000, 500):
        state, _ = compiled(state, feed.chunk(at, 500), np.int32(500))
    # Eight draws for each image: that of one alone is known to about 1%.
    loss, _, _ = Evaluator(trainer, np.tile(shaped, (8, 1, 1, 1)), mesh)(state)

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
