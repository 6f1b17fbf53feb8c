"""A prior that is learnt: a second VAE on the first one's latents, trained by the same steps (Dai & Wipf 2019)."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from facevae_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.data.batches import ResidentFeed
from facevae_jax.data.plan import BatchPlan, steps_per_epoch
from facevae_jax.latents.priors import Gaussian, Indices, normal_by_index
from facevae_jax.models.latent_vae import LatentVAE
from facevae_jax.models.vae import Execution
from facevae_jax.objective import gaussian_kl
from facevae_jax.progress import progress_bar
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import create_state, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps, evaluation_variance

EPOCHS, MIN_STEPS = 40, 1_500
BATCH_SIZE = 256
WIDTH_PER_DIMENSION, MIN_WIDTH, MAX_WIDTH = 4, 256, 1024
LEARNING_RATE = 1e-3
STEPS_PER_DISPATCH = 256
BOUND_DRAWS = 8  # of the second stage's posterior, for each latent whose density is bounded


class SecondStage(flax.struct.PyTreeNode):
    """Latents z = m + R y, where y is what the second VAE decodes, plus its Gaussian noise."""

    whitening: Gaussian  # m and R: those of the aggregate posterior, so that y has mean 0 and covariance I
    variables: Any
    variance: Float[Array, ""]  # of the noise on y
    model: LatentVAE = flax.struct.field(pytree_node=False)

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: float = 1.0) -> Float[Array, "n z"]:  # noqa: D102
        size = self.model.latent_dim
        latent_key, noise_key = jax.random.split(key)
        u = temperature * normal_by_index(latent_key, indices, size)
        noise = temperature * jnp.sqrt(self.variance) * normal_by_index(noise_key, indices, size)
        y: Any = self.model.apply(self.variables, u, method="decode")
        return self.whitening.mean + (y[:, 0, 0] + noise) @ self.whitening.root.T

    def log_density(self, latents: Float[Array, "n z"]) -> Float[Array, " n"]:
        """A lower bound, in nats: the mean of the second stage's ELBO over `BOUND_DRAWS` draws."""
        root = self.whitening.root
        y = jnp.linalg.solve(root, (latents - self.whitening.mean).T).T
        posterior: Any = self.model.apply(self.variables, y[:, None, None], method="encode")

        def likelihood(key: PRNGKeyArray) -> Float[Array, " n"]:
            u = posterior.sample(jax.random.normal(key, posterior.mean.shape))
            decoded: Any = self.model.apply(self.variables, u, method="decode")
            error = jnp.sum(jnp.square(y - decoded[:, 0, 0]), axis=1)
            return -0.5 * (error / self.variance + y.shape[1] * jnp.log(2 * math.pi * self.variance))

        draws = jax.vmap(likelihood)(jax.random.split(jax.random.key(0), BOUND_DRAWS))
        kl = jnp.sum(gaussian_kl(posterior), axis=1)
        return jnp.mean(draws, axis=0) - kl - jnp.linalg.slogdet(root)[1]


def make_second_stage(whitening: Gaussian, *, variables: Any = None, variance: Any = 1.0) -> SecondStage:
    """The prior, with the network that suits the length of the latents."""
    size = int(whitening.mean.shape[0])
    width = min(max(WIDTH_PER_DIMENSION * size, MIN_WIDTH), MAX_WIDTH)
    return SecondStage(whitening, variables, variance, LatentVAE(size, width, Execution("plain")))


def train_second_stage(latents: Float32[np.ndarray, "n z"], whitening: Gaussian, *, seed: int = 0) -> SecondStage:
    """Trains the second VAE on draws from the first one's posteriors.

    Args:
      latents: one draw for each image or more, in random order or not.
      whitening: mean and root of the covariance of the latents; the root must be regular.
      seed: of the initialisation, the batches and the draws.
    """
    prior = make_second_stage(whitening)
    whitened = np.linalg.solve(np.asarray(whitening.root, np.float64), (latents - np.asarray(whitening.mean)).T).T
    mesh = make_mesh(jax.local_devices()[:1])  # a step takes a millisecond: exchanging its gradients would take longer
    batch_size = min(BATCH_SIZE, len(latents))
    steps = max(EPOCHS * steps_per_epoch(len(whitened), batch_size), MIN_STEPS)
    config = RunConfig(
        data=DataConfig(name="latents"),
        model=ModelConfig(latent_dim=whitened.shape[1]),
        # Warmed up: latents that are nearly Gaussian already invite a second stage that ignores its own latents.
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
    model: Any = prior.model  # in place of a VAE of images, of which the trainer uses no more than this has
    trainer = Trainer(config, model, make_optimizer(config.train, total_steps=steps))
    state = create_state(config, trainer.model, trainer.optimizer, mesh)
    feed = ResidentFeed(
        np.asarray(whitened[:, None, None], np.float32),
        BatchPlan(seed, len(whitened), batch_size),
        capacity=STEPS_PER_DISPATCH,
        pixels_sharding=replicated(mesh),
        rows_sharding=split_along(mesh, 1),
    )
    compiled = compile_train_steps(trainer, state, feed.abstract_chunk(), capacity=STEPS_PER_DISPATCH)
    with progress_bar(total=steps, description="training the second stage", unit="step") as progress:
        for at in range(0, steps, STEPS_PER_DISPATCH):
            count = min(STEPS_PER_DISPATCH, steps - at)
            state, metrics = compiled(state, feed.chunk(at, count), np.int32(count))
            jax.block_until_ready(metrics)
            progress.update(count)
    variance = evaluation_variance(state.decoder_variance, state.params, trainer=trainer)
    return prior.replace(variables={"params": state.params}, variance=variance)


@functools.lru_cache(maxsize=4)
def abstract_variables(prior_model: LatentVAE) -> Any:
    """Shapes of the network's variables, to put saved arrays into."""
    image, noise = jnp.zeros((1, *prior_model.image_shape)), jnp.zeros((1, prior_model.latent_dim))
    return jax.eval_shape(lambda: prior_model.init(jax.random.key(0), image, noise, train=False))
