"""Principal components of the pixels (eigenfaces): the linear baseline, fitted by scikit-learn and not trained."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.core.progress import progress_bar
from facevae_jax.core.settings import CHANNELS, check
from facevae_jax.models.api import Execution, Gaussian, Output, WholeCode, to_unit
from facevae_jax.models.likelihoods import LIKELIHOODS, Decoded, GaussianLikelihood, MseLikelihood
from facevae_jax.models.vae import MAX_LATENT_DIM, refuse_rate

BATCH = 1_024  # images at a time, at least
SMALLEST_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How many components."""

    kind: Literal["pca"] = "pca"
    latent_dim: int = 200

    def __post_init__(self) -> None:
        in_range = 0 < self.latent_dim <= MAX_LATENT_DIM
        check(in_range, "model.latent_dim", self.latent_dim, f"positive and at most {MAX_LATENT_DIM}")

    def check_run(self, run: Any) -> None:
        """Raises a ValueError for settings of a `RunConfig` that have no meaning here."""
        refuse_rate(self.kind, run)
        likelihood, train = run.objective.likelihood, run.train
        check(LIKELIHOODS[likelihood] is MseLikelihood, "objective.likelihood", likelihood, "mse: pca has no other")
        check(train.steps in (0, 1), "train.steps", train.steps, "0: pca is fitted in one step, without an optimizer")
        check(not train.ema_decay, "train.ema_decay", train.ema_decay, "0: pca has no optimizer")


class PCA(WholeCode, nn.Module):
    """x' = m + Σ z_i σ_i u_i, with latents z_i = u_iᵀ (x - m) / σ_i of variance 1 over the training images.

    So its N(0, I) is the Gaussian of the same mean and of the components' covariance.
    """

    config: Config
    resolution: int

    @property
    def image_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.resolution, self.resolution, CHANNELS

    @property
    def code_shape(self) -> tuple[int, ...]:  # noqa: D102
        return (self.config.latent_dim,)

    def setup(self) -> None:  # noqa: D102
        size, components = math.prod(self.image_shape), self.config.latent_dim
        self.mean = self.param("mean", nn.initializers.zeros, (size,))
        self.components = self.param("components", nn.initializers.zeros, (components, size))  # rows of length 1
        self.deviations = self.param("deviations", nn.initializers.ones, (components,))

    def __call__(  # noqa: D102
        self,
        images: Shaped[Array, "b h w c"],
        keys: Key[Array, " b"] | None,
        *,
        train: bool,
        weights: Float[Array, " b"] | None = None,
    ) -> Output:
        return Output(self.decode(self.encode(images).mean), ())

    def encode(self, images: Shaped[Array, "b h w c"]) -> Gaussian:  # noqa: D102
        flat = to_unit(images).reshape(images.shape[0], -1)
        projected = jnp.matmul(flat - self.mean[None], self.components.T, precision=jax.lax.Precision.HIGHEST)
        return Gaussian.point(projected / self.deviations[None])

    def decode(  # noqa: D102
        self, code: Float[Array, "b z"], details: Float[Array, "b d"] | None = None
    ) -> Decoded:
        scaled = code * self.deviations[None]
        flat = self.mean[None] + jnp.matmul(scaled, self.components, precision=jax.lax.Precision.HIGHEST)
        return Decoded(jnp.clip(flat, 0.0, 1.0).reshape(-1, *self.image_shape))


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> PCA:
    """The model of a run."""
    return PCA(config, resolution)


def fit(
    config: Config, images: UInt8[np.ndarray, "n h w c"], *, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Parameters of `PCA`: mean, components by falling variance, and their standard deviations.

    Args:
      config: of the model.
      images: of the training split, read once in batches.
      progress: called after each batch.

    Raises:
      UserError: there are not more images, or pixel values, than components.
    """
    from sklearn.decomposition import IncrementalPCA  # takes a second to import

    count, size, wanted = len(images), images[0].size, config.latent_dim
    if wanted >= min(count, size):
        raise UserError(
            f"config.model.latent_dim={wanted}: PCA of {count:,} images has at most "
            f"{min(count, size) - 1:,} components."
        )
    found = IncrementalPCA(wanted)
    batches = max(1, count // max(BATCH, 2 * wanted))
    with progress_bar(total=count, description="fitting the components") as bar:
        for rows in np.array_split(np.arange(count), batches):  # each has more images than there are components
            found.partial_fit(images[rows].reshape(len(rows), -1).astype(np.float32) / 255.0)
            bar.update(len(rows))
            progress()
    # scikit-learn divides by n - 1; divided by n, the codes have variance 1 over these images.
    deviations = found.singular_values_ / math.sqrt(count)
    arrays = {
        "mean": found.mean_,
        "components": found.components_,
        "deviations": np.maximum(deviations, SMALLEST_DEVIATION),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}
