"""A learned prior: a second VAE on the codes of the first one, trained by the same steps (Dai & Wipf 2019)."""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, PRNGKeyArray

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.core.progress import progress_bar
from facevae_jax.data.feed import ResidentFeed
from facevae_jax.data.plan import BatchPlan, steps_per_epoch
from facevae_jax.latents.priors.base import FitData, Indices, normal_by_index
from facevae_jax.latents.priors.mixture import COVARIANCE_FLOOR, MIN_DRAWS
from facevae_jax.models.api import Gaussian, LatentGroup, Output, image_keys
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood
from facevae_jax.objective import gaussian_kl
from facevae_jax.training.setup import TrainSetup, create_state, make_mesh, make_optimizer, replicated, split_along
from facevae_jax.training.step import compile_train_steps

EPOCHS, MIN_STEPS = 40, 1_500
BATCH_SIZE = 256
LAYERS = 2
WIDTH_PER_DIMENSION, MIN_WIDTH, MAX_WIDTH = 4, 256, 1024
LEARNING_RATE = 1e-3
STEPS_PER_DISPATCH = 256
BOUND_DRAWS = 8  # of the posterior, for each code whose density is bounded


class Perceptron(nn.Module):
    """Dense layers with SiLU, and the input beside their output, so that what is linear need not be learned twice."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:  # noqa: D102
        y = x
        for _ in range(LAYERS):
            y = nn.silu(nn.Dense(self.width)(y))
        return nn.Dense(self.features)(jnp.concatenate([y, x], axis=-1))


class CodeVAE(nn.Module):
    """A VAE of vectors, with as many latents as they have numbers; see `models.api.Model`."""

    size: int

    @property
    def image_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.size,)

    @property
    def code_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.size,)

    def setup(self) -> None:  # noqa: D102
        width = min(max(WIDTH_PER_DIMENSION * self.size, MIN_WIDTH), MAX_WIDTH)
        self.encoder = Perceptron(width, 2 * self.size)
        self.decoder = Perceptron(width, self.size)

    def __call__(self, images: Float[Array, "b z"], keys: Key[Array, " b"], *, train: bool) -> Output:  # noqa: D102
        posterior = self.encode(images)
        code = posterior.sample(keys)
        return Output(self.decode(code), (LatentGroup(code, posterior),))

    def encode(self, images: Float[Array, "b z"]) -> Gaussian:  # noqa: D102
        return Gaussian.bounded(*jnp.split(self.encoder(images), 2, axis=-1))

    def decode(  # noqa: D102
        self, code: Float[Array, "b z"], keys: Key[Array, " b"] | None = None, *, temperature: float = 1.0
    ) -> Decoded:
        return Decoded(self.decoder(code))


class SecondStage(NamedTuple):
    """Codes m + R y; the second VAE decodes y, and its Gaussian noise is added."""

    mean: Float[Array, " z"]  # m and R: those of the aggregate posterior, so that y has mean 0 and covariance I
    root: Float[Array, "z z"]  # regular
    variables: Any
    variance: Float[Array, ""]  # of the noise on y


class SecondStagePrior(SecondStage):
    """See `SecondStage`."""

    label: ClassVar[str] = "Second-stage VAE"
    description: ClassVar[str] = "a second VAE on the codes; its rate is an upper bound"
    kept: ClassVar[bool] = True

    @classmethod
    def fit(cls, data: FitData) -> "SecondStagePrior":
        """Trains the second VAE on draws from the posteriors of the first."""
        codes = data.draws("train", at_least=MIN_DRAWS)
        mean = codes.mean(axis=0)
        covariance = np.cov(codes.T, dtype=np.float64).reshape(len(mean), -1)
        root = np.linalg.cholesky(covariance + COVARIANCE_FLOOR * np.eye(len(covariance)))
        whitened = np.linalg.solve(root, (codes - mean).T).T
        params, variance = train_second_stage(whitened.astype(np.float32))
        return cls(jnp.asarray(mean), jnp.asarray(root, jnp.float32), {"params": params}, variance)

    @property
    def model(self) -> Any:
        """The network."""
        return CodeVAE(self.mean.shape[0])

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: Any = 1.0) -> Float[Array, "n z"]:  # noqa: D102
        size = self.mean.shape[0]
        latent_key, noise_key = jax.random.split(key)
        u = temperature * normal_by_index(latent_key, indices, size)
        noise = temperature * jnp.sqrt(self.variance) * normal_by_index(noise_key, indices, size)
        y = self.model.apply(self.variables, u, method="decode").mean
        return self.mean[None] + (y + noise) @ self.root.T

    def log_density(self, codes: Float[Array, "n z"]) -> Float[Array, " n"]:
        """A lower bound, in nats: the mean of the second stage's ELBO over `BOUND_DRAWS` draws."""
        y = jnp.linalg.solve(self.root, (codes - self.mean[None]).T).T
        posterior: Any = self.model.apply(self.variables, y, method="encode")

        def log_likelihood(key: PRNGKeyArray) -> Float[Array, " n"]:
            u = posterior.sample(image_keys(key, len(y)))
            error = jnp.sum(jnp.square(y - self.model.apply(self.variables, u, method="decode").mean), axis=1)
            return -0.5 * (error / self.variance + y.shape[1] * jnp.log(2 * math.pi * self.variance))

        draws = jax.vmap(log_likelihood)(jax.random.split(jax.random.key(0), BOUND_DRAWS))
        kl = jnp.sum(gaussian_kl(posterior), axis=1)
        return jnp.mean(draws, axis=0) - kl - jnp.linalg.slogdet(self.root)[1]

    def to_arrays(self) -> dict[str, np.ndarray]:  # noqa: D102
        leaves = {f"variables_{number}": leaf for number, leaf in enumerate(jax.tree.leaves(self.variables))}
        return jax.device_get({"mean": self.mean, "root": self.root, "variance": self.variance} | leaves)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "SecondStagePrior":  # noqa: D102
        mean, root, variance = (jnp.asarray(arrays[name]) for name in ("mean", "root", "variance"))
        prior = cls(mean, root, None, variance)
        shapes, structure = jax.tree.flatten(abstract_variables(prior.model))
        leaves = [jnp.asarray(arrays[f"variables_{number}"]) for number in range(len(shapes))]
        return prior._replace(variables=jax.tree.unflatten(structure, leaves))


def train_second_stage(whitened: Float32[np.ndarray, "n z"], *, seed: int = 0) -> tuple[Any, Float[Array, ""]]:
    """Parameters of the second VAE and the variance of its noise.

    Args:
      whitened: draws of mean 0 and covariance I, one for each image or more, in random order or not.
      seed: of the initialization, the batches and the draws.
    """
    model: Any = CodeVAE(whitened.shape[1])
    mesh = make_mesh(jax.local_devices()[:1])  # a step takes a millisecond: exchanging its gradients would take longer
    batch_size = min(BATCH_SIZE, len(whitened))
    steps = max(EPOCHS * steps_per_epoch(len(whitened), batch_size), MIN_STEPS)
    config = RunConfig(
        data=DataConfig(name="codes"),
        # Warmed up: codes that are nearly Gaussian already invite a second stage that ignores its own latents.
        objective=ObjectiveConfig(likelihood="gaussian", kl_warmup_steps=steps // 2),
        train=TrainConfig(
            seed=seed,
            batch_size=batch_size,
            steps=steps,
            learning_rate=LEARNING_RATE,
            schedule="cosine",
            warmup_steps=100,
        ),
    )
    likelihood = GaussianLikelihood(whitened.shape[1])
    setup = TrainSetup(config, model, likelihood, make_optimizer(config.train, total_steps=steps), mesh)
    state = create_state(setup)
    feed = ResidentFeed(
        whitened,
        BatchPlan(seed, len(whitened), batch_size),
        capacity=STEPS_PER_DISPATCH,
        pixels_sharding=replicated(mesh),
        rows_sharding=split_along(mesh, 1),
    )
    compiled = compile_train_steps(setup, state, feed.abstract_chunk(), capacity=STEPS_PER_DISPATCH)
    with progress_bar(total=steps, description="training the second stage", unit="step") as progress:
        for at in range(0, steps, STEPS_PER_DISPATCH):
            count = min(STEPS_PER_DISPATCH, steps - at)
            state, metrics = compiled(state, feed.chunk(at, count), np.int32(count))
            jax.block_until_ready(metrics)
            progress.update(count)
    return state.params, likelihood.evaluation_variance(state.decoder_variance.mean, state.params)


@functools.lru_cache(maxsize=4)
def abstract_variables(model: CodeVAE) -> Any:
    """Shapes of the network's variables, to put saved arrays into."""
    codes, keys = jnp.zeros((1, model.size)), image_keys(jax.random.key(0), 1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), codes, keys, train=False))
