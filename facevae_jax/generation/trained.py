"""A trained model as an object: `model = facevae_jax.load(workdir)`, then `model.sample(64)`."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float, Float32, Shaped, UInt8

from facevae_jax.config import CHANNELS, RunConfig
from facevae_jax.errors import UserError
from facevae_jax.latents import priors
from facevae_jax.latents.priors import LatentMoments, Prior, PriorName
from facevae_jax.models.inference import Encoded, Inference
from facevae_jax.random import named_key
from facevae_jax.training.checksums import checksums
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.sharding import make_mesh, replicated
from facevae_jax.training.step import Trainer, evaluation_variance

MAX_TEMPERATURE = 10.0
UNSEEN = ("cache_dir", "feed", "flip", "dequantize")  # settings of the data that do not change which images there are


class Faces(NamedTuple):
    """Images and where they come from."""

    images: UInt8[np.ndarray, "n r r 3"]
    names: tuple[str, ...]  # of the files, or of the rows of a split


class TrainedVAE:
    """A variational autoencoder with its parameters, on all local devices.

    Images are uint8 [n, R, R, 3] and latents float32 [n, z], both numpy arrays; R is `resolution`, z `latent_dim`.
    """

    def __init__(self, restored: RestoredModel, *, folder: pathlib.Path, batch_size: int = 0) -> None:
        """Puts the parameters on the devices.

        Args:
          restored: config, parameters and moments of the latents.
          folder: where it was read from; what is fitted to the latents is kept there.
          batch_size: images that are computed at a time, at most; 0: what suits the resolution.
        """
        mesh = make_mesh()
        self.config: RunConfig = restored.config
        self.module = restored.model
        self.variables = jax.device_put(restored.variables, replicated(mesh))
        self.moments: LatentMoments = restored.latent_moments
        self.step = restored.step  # optimiser steps that it was trained for
        self.folder = folder
        trainer = Trainer(self.config, self.module, optimizer=optax.identity())
        # Of the Gaussian p(x | z), pixels in [0, 1].
        self.variance = float(evaluation_variance(restored.decoder_variance, self.variables["params"], trainer=trainer))
        self.inference = Inference(self.module, self.variables, mesh, batch_size=batch_size)

    @property
    def resolution(self) -> int:
        """Pixels along one side of an image."""
        return self.config.data.resolution

    @property
    def latent_dim(self) -> int:
        """Numbers of a latent."""
        return self.config.model.latent_dim

    def encode(self, images: Shaped[np.ndarray, "n r r 3"]) -> Encoded:
        """The posteriors q(z | x): `mean` and `log_variance`, each float32 [n, z].

        The mean is the latent to edit and to morph; `posterior_sample` draws one instead.

        Raises:
          UserError: images of another shape or type.
        """
        return self.inference.encode(self.check_images(images))

    def posterior_sample(self, posterior: Encoded, *, seed: int = 0, first: int = 0) -> Float32[np.ndarray, "n z"]:
        """A draw from each posterior, of which the first is number `first` of the seed's."""
        indices = np.arange(first, first + len(posterior.mean))
        noise = np.asarray(priors.normal_by_index(named_key(seed, "posterior"), indices, self.latent_dim))
        return posterior.mean + np.exp(0.5 * posterior.log_variance) * noise

    def decode(self, latents: Float[np.ndarray, "n z"]) -> UInt8[np.ndarray, "n r r 3"]:
        """Images of latents.

        Raises:
          UserError: latents of another length, or none that is a number.
        """
        return self.inference.decode(self.check_latents(latents))

    def reconstruct(self, images: Shaped[np.ndarray, "n r r 3"]) -> UInt8[np.ndarray, "n r r 3"]:
        """Images of the posteriors' means.

        Raises:
          UserError: images of another shape or type.
        """
        return self.inference.reconstruct(self.check_images(images))

    def sample(
        self, count: int, *, prior: PriorName | Prior = "gaussian", temperature: float = 1.0, seed: int = 0
    ) -> UInt8[np.ndarray, "n r r 3"]:
        """New faces, decoded from `sample_latents`."""
        return self.decode(self.sample_latents(count, prior=prior, temperature=temperature, seed=seed))

    def sample_latents(
        self, count: int, *, prior: PriorName | Prior = "gaussian", temperature: float = 1.0, seed: int = 0
    ) -> Float32[np.ndarray, "n z"]:
        """Latents number 0 to `count` - 1 of a seed; the first ones do not depend on how many are drawn.

        Args:
          count: how many.
          prior: `gaussian` is the one fitted to the posteriors, `standard` N(0, I); others come from
            `generation.fitting.fitted_prior`.
          temperature: factor on the standard deviations; below 1 gives faces nearer to the mean one.
          seed: another seed gives other faces.

        Raises:
          UserError: the run has not been evaluated, which the fitted prior needs; an impossible temperature.
        """
        draw = self.drawer(prior, temperature=temperature)
        return np.asarray(draw(named_key(seed, "sample"), np.arange(count)))

    def sample_stream(
        self, count: int, *, prior: PriorName | Prior = "gaussian", temperature: float = 1.0, seed: int = 0
    ) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
        """The faces of `sample` a batch at a time, in memory that does not grow with their number."""
        draw, size = self.drawer(prior, temperature=temperature), self.inference.batch_size
        key = named_key(seed, "sample")
        # Always a whole batch, so that it is compiled once.
        latents = (np.asarray(draw(key, np.arange(at, at + size)))[: count - at] for at in range(0, count, size))
        return self.inference.decode_stream(latents)

    def drawer(self, prior: PriorName | Prior, *, temperature: float) -> priors.Drawer:
        """A compiled function from a key and indices to latents."""
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise UserError(f"temperature={temperature} must be from 0 to {MAX_TEMPERATURE:g}.")
        return priors.drawer(self.prior(prior) if isinstance(prior, str) else prior, temperature=temperature)

    def prior(self, name: PriorName) -> Prior:
        """The distribution of a name.

        Raises:
          UserError: it is fitted to latents that are not there.
        """
        if name == "standard":
            return priors.standard(self.latent_dim)
        if name == "gaussian":
            if not self.moments.images:
                raise UserError(
                    f"{str(self.folder)!r}: the gaussian prior needs a run that was evaluated once: train on, or take "
                    "the standard one."
                )
            return priors.fitted_gaussian(self.moments)
        from facevae_jax.generation.fitting import fitted_prior  # scikit-learn takes a second to import

        return fitted_prior(self, name)

    @functools.cached_property
    def identity(self) -> str:
        """Names this model and its data in the names of what is fitted to its latents: step, and a hash of both."""
        of_data = {key: value for key, value in dataclasses.asdict(self.config.data).items() if key not in UNSEEN}
        content = json.dumps([checksums(self.variables), of_data], sort_keys=True)
        return f"{self.step:08d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @functools.cached_property
    def mean_latent(self) -> Float32[np.ndarray, " z"]:
        """The mean of the aggregate posterior: the average face; zeros before the first evaluation."""
        return np.asarray(self.moments.mean, np.float32)

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """The images, if they are uint8, or floats in [0, 1], of this model's resolution.

        Raises:
          UserError: they are not.
        """
        images = np.asarray(images)
        side = self.resolution
        if images.ndim != 4 or images.shape[1:] != (side, side, CHANNELS):
            raise UserError(
                f"images of shape {list(images.shape)}: this model takes [n, {side}, {side}, {CHANNELS}]; "
                "facevae_jax.read_faces crops and resizes files."
            )
        if images.dtype == np.uint8:
            return images
        floats = np.issubdtype(images.dtype, np.floating)
        if not (floats and images.min(initial=0) >= 0 and images.max(initial=1) <= 1):
            raise UserError(f"images of type {images.dtype} must be uint8, or floats from 0 to 1.")
        return images.astype(np.float32)

    def check_latents(self, latents: np.ndarray) -> Float32[np.ndarray, "n z"]:
        """The latents as float32, if they are this model's.

        Raises:
          UserError: they are not.
        """
        latents = np.asarray(latents)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or not np.issubdtype(latents.dtype, np.number):
            raise UserError(
                f"latents of shape {list(latents.shape)} and type {latents.dtype}: this model's are "
                f"[n, {self.latent_dim}] floats."
            )
        if not np.isfinite(latents).all():
            raise UserError("latents that are not finite have no picture.")
        return latents.astype(np.float32)
