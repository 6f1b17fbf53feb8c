"""A trained model as an object: `model = facevae_jax.load(workdir)`, then `model.sample(64)`."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Shaped, UInt8

from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError, check_choice
from facevae_jax.core.random import named_key
from facevae_jax.core.settings import MAX_SEED
from facevae_jax.data.dataset import open_dataset
from facevae_jax.inference import Detailed, Encoded, Inference, draw_details, numbered
from facevae_jax.latents.moments import Moments
from facevae_jax.latents.priors import FLOW, GAUSSIAN, PRIORS, prior_class
from facevae_jax.latents.priors.base import Prior, Sampler, is_kept, sampler
from facevae_jax.latents.temperature import Temperature, temperatures
from facevae_jax.trained import codes, labels
from facevae_jax.trained.artifacts import ArtifactStore, short_hash
from facevae_jax.training.checksums import checksums
from facevae_jax.training.setup import RunningMean, make_model, replicated

MAX_COUNT = 10**8  # faces
PRIOR_SHARE = 0.1  # of the time of training, which fitting the learned prior may take at its end
MIN_PRIOR_SECONDS = 5.0  # the first steps of a fit take longer to compile: where less is allowed, it is not begun
# Settings of the data that do not change which images there are; what is in `data_dir` has its own fingerprint.
UNSEEN = ("data_dir", "cache_dir", "feed", "flip", "dequantize")


class Restored(NamedTuple):
    """What a checkpoint or an exported file holds of a model."""

    config: RunConfig
    variables: Any  # averaged parameters where the run kept them
    decoder_variance: RunningMean  # running mean of the likelihood's variance
    step: int
    moments: Moments | None = None  # of an exported model, which may be used without its data


class TrainedModel:
    """A model with its parameters, on all local devices.

    Images are uint8 [n, R, R, 3] and codes float32 [n, *code_shape], both numpy arrays. Tools that need vectors, and
    `sample_codes`, have codes flat: [n, code_size]. Under `jit`, `vmap` and `grad` use `module`, a linen module with
    the methods of `models.api.Model`, and `variables`:

        posterior = model.module.apply(model.variables, images, method="encode")
        decoded = model.module.apply(model.variables, posterior.mean, method="decode").mean    # [n, R, R, 3] in [0, 1]
    """

    def __init__(self, restored: Restored, *, folder: pathlib.Path, mesh: Mesh, batch_size: int = 0) -> None:
        """Puts the parameters on the devices.

        Args:
          restored: config and parameters.
          folder: where it was read from; what is fitted to the model is kept there.
          mesh: of the devices that compute.
          batch_size: images that are computed at a time, at most; 0: what suits the resolution.
        """
        self.config: RunConfig = restored.config
        self.module, self.likelihood = make_model(self.config)
        self.variables = jax.device_put(restored.variables, replicated(mesh))
        self.step = restored.step  # optimizer steps that it was trained for
        self.folder = folder
        running = restored.decoder_variance.mean
        # Of the Gaussian p(x | z), pixels in [0, 1].
        self.variance = float(self.likelihood.evaluation_variance(running, self.variables["params"]))
        self.inference = Inference(self.module, self.variables, mesh, batch_size=batch_size)
        self.dataset = open_dataset(self.config.data)  # need not be on this machine until they are asked for
        self.artifacts = ArtifactStore(folder, model=lambda: self.identity, data=lambda: self.dataset.fingerprint)
        self.codes = codes.CodeSource(
            self.inference,
            self.dataset,
            self.artifacts,
            moments=restored.moments,
            mesh=mesh,
            mirrors=self.config.data.flip,
        )
        self._restored = restored

    def __repr__(self) -> str:
        data = self.config.data
        return f"TrainedModel({self.config.model.kind}, {data.name} at {data.resolution}, step {self.step:,})"

    @property
    def resolution(self) -> int:
        """Pixels along one side of an image."""
        return self.config.data.resolution

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of one code: (z,) of a flat one, (h, w, c) of a spatial one."""
        return self.module.code_shape

    @property
    def code_size(self) -> int:
        """Numbers of a code."""
        return math.prod(self.code_shape)

    @property
    def detail_size(self) -> int:
        """Numbers of the groups of latents below the code; 0 but for a hierarchy."""
        return self.inference.detail_size

    def encode(self, images: Shaped[np.ndarray, "n r r 3"]) -> Encoded:
        """The posteriors q(code | x): `mean` and `log_variance`, each float32 [n, *code_shape].

        The mean is the code to edit and to morph; `posterior_sample` draws one instead.

        Raises:
          UserError: images of another shape or type.
        """
        posterior = self.inference.encode(self.check_images(images))
        return Encoded(*(field.reshape(-1, *self.code_shape) for field in posterior))

    posterior_sample = staticmethod(codes.posterior_sample)

    def decode(
        self, codes: Float[np.ndarray, "n ..."], details: Float[np.ndarray, "n d"] | None = None
    ) -> UInt8[np.ndarray, "n r r 3"]:
        """Images of codes, [n, *code_shape] or flat.

        Args:
          codes: as of `encode`.
          details: values of the groups of latents below the code, such as those of `details`; None: they are at the
            means of their priors. Only a hierarchy has such groups.

        Raises:
          UserError: codes or details of another shape, or codes that are not finite.
        """
        flat = self.check_codes(codes)
        if details is None:
            return self.inference.decode(flat)
        details = np.asarray(details, np.float32)
        if details.shape != (wanted := (len(flat), self.detail_size)):
            raise UserError(f"details of shape {list(details.shape)}: give {list(wanted)}.")
        batches = self.inference.batches(Detailed(flat, details))
        return np.concatenate(list(self.inference.decode_detailed(batches)))

    def details(self, images: Shaped[np.ndarray, "n r r 3"]) -> Float32[np.ndarray, "n d"]:
        """Values of the groups of latents below the code: what a hierarchy knows of images beside their codes.

        They are the means of the posteriors in standard deviations from the means of the priors, so that draws from
        N(0, I) are details of a new face.

        Raises:
          UserError: images of another shape or type.
        """
        return self.inference.details(self.check_images(images))

    def reconstruct(self, images: Shaped[np.ndarray, "n r r 3"]) -> UInt8[np.ndarray, "n r r 3"]:
        """Images of the posteriors' means.

        Raises:
          UserError: images of another shape or type.
        """
        return self.inference.reconstruct(self.check_images(images))

    def sample(
        self, count: int, *, prior: str | Prior | None = None, temperature: Temperature = 1.0, seed: int = 0
    ) -> UInt8[np.ndarray, "n r r 3"]:
        """New faces, decoded from `sample_codes`; groups of latents below the code are drawn from their own priors."""
        codes = self.sample_codes(count, prior=prior, temperature=temperature, seed=seed)
        return np.concatenate(
            list(self.decode_draws(self.inference.batches(codes), temperature=temperature, seed=seed))
        )

    def sample_codes(
        self, count: int, *, prior: str | Prior | None = None, temperature: Temperature = 1.0, seed: int = 0
    ) -> Float32[np.ndarray, "n z"]:
        """Flat codes number 0 to `count` - 1 of a seed; the first ones do not depend on how many are drawn.

        Args:
          count: how many.
          prior: a name in `latents.priors.PRIORS`, or a distribution; None: `default_prior`.
          temperature: factor on the standard deviations; below 1 gives faces nearer to the mean one. Of a hierarchy
            also a number for each resolution from which on it holds, such as {1: 1.0, 16: 0.8}.
          seed: another seed gives other faces.

        Raises:
          UserError: an unknown prior, or one that is fitted to data which are not on this machine; an impossible
            count, temperature or seed.
        """
        _check_draws(count, seed)
        sample = self.sampler(prior, temperature=temperature)
        return np.asarray(sample(named_key(seed, "sample"), np.arange(count)))

    def sample_details(
        self, count: int, *, temperature: Temperature = 1.0, seed: int = 0, first: int = 0
    ) -> Float32[np.ndarray, "n d"]:
        """The values below the codes that `sample` draws with the same seed, from number `first` on."""
        _check_draws(count, seed)
        if not self.detail_size:
            return np.zeros((count, 0), np.float32)
        of_details = temperatures(temperature, self.inference.detail_shapes).details
        nothing = self.inference.batches(np.zeros((count, 0), np.float32))
        draws = numbered(nothing, seed=seed, temperatures=of_details, first=first)
        return np.concatenate(list(self.inference.map_stream(draw_details, draws)))

    def sample_stream(
        self,
        count: int,
        *,
        prior: str | Prior | None = None,
        temperature: Temperature = 1.0,
        seed: int = 0,
        details: bool = True,
        detail_seed: int | None = None,
    ) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
        """The faces of `sample` a batch at a time, in memory that does not grow with their number.

        Without `details`, a hierarchy's groups below the code are at the means of their priors; `detail_seed` draws
        others for the codes of `seed`.
        """
        _check_draws(count, seed)
        sample = self.sampler(prior, temperature=temperature)
        size = min(self.inference.batch_size, 1 << max(count - 1, 0).bit_length())
        key = named_key(seed, "sample")
        # Always as many, so that it is compiled once.
        batches = (np.asarray(sample(key, np.arange(at, at + size)))[: count - at] for at in range(0, count, size))
        if not details:
            return self.inference.decode_stream(batches)
        return self.decode_draws(batches, temperature=temperature, seed=seed if detail_seed is None else detail_seed)

    def decode_draws(
        self, codes: Iterable[Float[np.ndarray, "b z"]], *, temperature: Temperature = 1.0, seed: int = 0
    ) -> Iterator[UInt8[np.ndarray, "b r r 3"]]:
        """Images of batches of flat codes, with the groups of latents below them drawn from their priors."""
        of_details = temperatures(temperature, self.inference.detail_shapes).details
        return self.inference.decode_draws(codes, seed=seed, temperatures=of_details)

    def sampler(self, prior: str | Prior | None, *, temperature: Temperature) -> Sampler:
        """A compiled function from a key and indices to flat codes."""
        factor = temperatures(temperature, self.inference.detail_shapes).code
        prior = self.default_prior if prior is None else prior
        if not isinstance(prior, str | Prior):
            raise UserError(f"--prior={prior!r:.40}: give one of {', '.join(PRIORS)}, or a distribution.")
        return sampler(self.prior(prior) if isinstance(prior, str) else prior, temperature=factor)

    def prior(self, name: str) -> Prior:
        """The prior of a name; fitted once to the training split, which may take minutes, then read.

        Raises:
          UserError: there is no such prior, or the data that it is fitted to are not on this machine.
        """
        check_choice(name, tuple(PRIORS), name="--prior")
        cls = prior_class(name)
        if not is_kept(cls):
            return cls.fit(self.codes)
        return self.kept_prior(name, lambda: cls.fit(self.codes))

    def fit_default_prior(self, *, seconds: float) -> bool:
        """Fits the learned prior, if that takes no longer; else what was done is kept for the next call."""
        return self.kept_prior(FLOW, lambda: prior_class(FLOW).fit(self.codes, seconds=seconds)) is not None

    def kept_prior(self, name: str, fit: Callable[[], Any] = lambda: None) -> Any:
        """The prior that was kept under this name, else the one of `fit`, which is kept, unless it is None."""
        kept = self.artifacts.get(f"prior-{name}")
        if kept is not None:
            return prior_class(name).from_arrays(kept.arrays)
        prior = fit()
        if prior is not None:
            self.artifacts.put(f"prior-{name}", prior.to_arrays())
            self.codes.unfinished(name).drop()
        return prior

    def prior_given(self, wanted: Sequence[str]) -> Prior:
        """The learned prior of faces with some labels.

        Args:
          wanted: such as `Smiling=1`, `age=35` or `hair=brown`: a number, or the name of a category.

        Raises:
          UserError: there is no such label or value; the data are not on this machine.
        """
        row = labels.parse(self.dataset.attributes, wanted)
        flow: Any = self.prior(FLOW)
        return cast(Prior, flow.given(self.codes.label_columns.wanted(row)))

    @functools.cached_property
    def default_prior(self) -> str:
        """The learned prior where it was fitted or can be: the data are on this machine; else the Gaussian."""
        if self.kept_prior(FLOW) is None:
            try:
                self.dataset.images("train")
            except UserError:
                return GAUSSIAN
        return FLOW

    def available_priors(self) -> list[str]:
        """Names of the priors that need no long fitting: those that the moments suffice for, and those kept before."""

        def is_there(name: str) -> bool:
            if is_kept(prior_class(name)):
                return self.artifacts.get(f"prior-{name}") is not None
            try:
                self.prior(name)
            except UserError:  # the data are not on this machine
                return False
            return True

        return [name for name in PRIORS if is_there(name)]

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the aggregate posterior of the training split.

        Raises:
          UserError: they were not computed yet, and the data are not on this machine.
        """
        return self.codes.moments()

    def keep_artifacts(self, *, training_seconds: float) -> bool:
        """Keeps what samples need in the run's folder, so that they need no data: the moments and the learned prior.

        Returns whether the prior was fitted, which may take a tenth of the time of training.
        """
        _ = self.moments
        seconds = PRIOR_SHARE * training_seconds
        if seconds < MIN_PRIOR_SECONDS:
            return self.kept_prior(FLOW) is not None
        return self.fit_default_prior(seconds=seconds)

    def portable(self) -> Restored:
        """All that a file of the model holds, with the moments, so that it is used without its data."""
        return self._restored._replace(moments=self.moments)

    @functools.cached_property
    def identity(self) -> str:
        """Names this model and its data in the names of artifacts: step, and a hash of both."""
        of_data = {key: value for key, value in dataclasses.asdict(self.config.data).items() if key not in UNSEEN}
        content = json.dumps([checksums(self.variables), of_data], sort_keys=True)
        return f"{self.step:08d}-{short_hash(content)}"

    def check_images(self, images: np.ndarray) -> np.ndarray:
        """The images, if they are uint8, or floats in [0, 1], of this model's resolution.

        Raises:
          UserError: they are not.
        """
        try:
            images = np.asarray(images)
        except ValueError as error:  # of different shapes
            raise UserError("images of different shapes: give one array, or as many of each size alone.") from error
        shape = self.module.image_shape
        if images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"images of shape {list(images.shape)}: this model takes [n, {', '.join(map(str, shape))}]; "
                "facevae_jax.read_faces crops and resizes files."
            )
        if images.dtype == np.uint8:
            return images
        floats = np.issubdtype(images.dtype, np.floating)
        if not (floats and images.min(initial=0) >= 0 and images.max(initial=1) <= 1):
            raise UserError(f"images of type {images.dtype} must be uint8, or floats from 0 to 1.")
        return images.astype(np.float32)

    def check_codes(self, codes: np.ndarray) -> Float32[np.ndarray, "n z"]:
        """The codes as flat float32, if they are this model's.

        Raises:
          UserError: they are not.
        """
        codes = np.asarray(codes)
        fits = codes.ndim > 0 and codes.shape[1:] in (self.code_shape, (self.code_size,))
        real = np.issubdtype(codes.dtype, np.floating) or np.issubdtype(codes.dtype, np.integer)
        if not fits or not real:
            raise UserError(
                f"codes of shape {list(codes.shape)} and type {codes.dtype}: this model takes floats of shape "
                f"[n, {', '.join(map(str, self.code_shape))}]."
            )
        with np.errstate(over="ignore"):
            flat = codes.reshape(len(codes), -1).astype(np.float32)
        if not np.isfinite(flat).all():
            raise UserError("codes that are not finite have no picture.")
        return flat


def _check_draws(count: int, seed: int) -> None:
    """Raises a UserError for a number of faces, or a seed, that there cannot be."""
    for name, value, low, high in (("count", count, 1, MAX_COUNT), ("seed", seed, 0, MAX_SEED)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (whole and low <= value <= high):
            raise UserError(f"--{name}={value!r:.40}: choose a whole number from {low} to {high}.")
