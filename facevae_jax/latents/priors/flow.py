"""A prior that is learned: a flow from the Gaussian of the codes, by flow matching."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Float32, PRNGKeyArray

from facevae_jax.core.random import keys_of, named_key
from facevae_jax.latents.moments import moments_of
from facevae_jax.latents.priors import flow_fit
from facevae_jax.latents.priors.base import FitData, Indices, normal_by_index
from facevae_jax.latents.priors.gaussian import Gaussian, GaussianPrior
from facevae_jax.latents.priors.velocity import Velocity

SAMPLE_STEPS = 3  # of the midpoint rule, of second order; each computes the velocity twice
DENSITY_STEPS = 32
EXACT_TRACE = 64  # numbers of a code, at most, whose trace is computed exactly
PROBES = 8  # random vectors that estimate it else (Hutchinson 1990)
WIDTH, BLOCKS = 256, 2  # of the network of vectors
GRID_WIDTH, GRID_BLOCKS = 96, 2  # of the network of a grid
MAX_NUMBERS = 2**27  # of the codes that it is fitted to, at most
MAX_LABELS = 4_096  # images whose labels are kept
GUIDANCE = 1.8  # how far labels move the velocity where all are binary; 1: as it was learned
NOISE = 0.95  # times that of the Gaussian: where samples with labels start
WANTED_GUIDANCE = 2.5  # of samples with wanted labels
NEAREST = 64  # training images, at least, whose other labels samples with wanted ones have
SMALLEST = 1e-6  # variance along a direction of the codes, of the largest


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["gaussian", "params", "labels", "guidance"], meta_fields=["network"]
)
@dataclasses.dataclass(frozen=True)
class FlowPrior:
    """Codes mean + root y, where y is where the flow takes noise from N(0, I) in an angle from 0 to pi/2.

    The flow solves dy/da = velocity(y, a). Without a velocity its density is the Gaussian's. Where the images have
    labels, the velocity depends on them too, and each sample has the labels of some training image.
    """

    label: ClassVar[str] = "Learned flow"
    description: ClassVar[str] = "a flow, fitted to the posteriors of the training split and their labels"

    gaussian: Gaussian
    params: Any
    labels: Float[Array, "m k"]  # of some training images, of about unit size; NaN where unknown
    network: Velocity
    guidance: Any = 1.0

    @classmethod
    def fit(cls, data: FitData, *, seconds: float = math.inf) -> "FlowPrior | None":
        """Fitted to draws from the posteriors of the training split.

        Args:
          data: the codes and labels.
          seconds: that the fit may take; None is returned, and the fit left unfinished, where it would take longer.
        """
        posteriors = data.posteriors("train")
        gaussian = GaussianPrior.of(moments_of(*posteriors), smallest=SMALLEST)
        inverse = np.linalg.inv(np.asarray(gaussian.root, np.float64)).astype(np.float32)
        labels = data.labels("train")
        codes = _whitened(*posteriors, labels, mean=np.asarray(gaussian.mean), inverse=inverse)
        held_out = (*data.posteriors("evaluation"), data.labels("evaluation"))
        params = flow_fit.fit(
            network_for(data.code_shape),
            codes,
            _whitened(*held_out, mean=np.asarray(gaussian.mean), inverse=inverse),
            mesh=data.mesh,
            unfinished=data.unfinished("flow"),
            seconds=seconds,
        )
        kept = jnp.asarray(labels[:: max(1, len(labels) // MAX_LABELS)][:MAX_LABELS])
        return None if params is None else cls(gaussian, params, kept, network_for(data.code_shape), _guidance(kept))

    def given(self, wanted: Float[np.ndarray, " k"]) -> "FlowPrior":
        """Of images with some labels, NaN where any will do.

        The other labels are those of the training images that are nearest, so that a beard comes with a man.
        """
        labels, asked = np.array(self.labels), ~np.isnan(wanted)
        distance = np.nansum(np.square(labels[:, asked] - wanted[None, asked]), axis=1)
        unknown = np.isnan(labels[:, asked]).any(axis=1)
        distance = np.where(unknown, np.inf, distance)
        nearest = np.sort(distance)[min(NEAREST, len(labels)) - 1]
        chosen = labels[distance <= nearest]
        chosen[:, asked] = wanted[asked]
        return dataclasses.replace(self, labels=jnp.asarray(chosen), guidance=WANTED_GUIDANCE)

    def velocity(
        self, y: Float[Array, "n z"], angle: Float[ArrayLike, ""], labels: Float[Array, "m k"]
    ) -> Float[Array, "n z"]:
        """dy/da."""
        at = jnp.asarray(angle, jnp.float32)[None]
        found: Any = self.network.apply({"params": self.params}, y, at, flow_fit.condition(labels))
        return found

    @property
    def unlabeled(self) -> Float[Array, "1 k"]:
        """What stands for labels where none is known."""
        return jnp.full((1, self.labels.shape[1]), jnp.nan)

    def sample(self, key: PRNGKeyArray, indices: Indices, *, temperature: Any = 1.0) -> Float[Array, "n z"]:
        """By `SAMPLE_STEPS` steps of the midpoint rule; `temperature` multiplies the noise at the start.

        With labels, the velocity is moved further from the one without (Ho & Salimans 2022, equation 6), and there is
        less noise: both make likelier faces.
        """
        keys = keys_of(jax.random.fold_in(key, len(flow_fit.Codes._fields)), indices)
        labels = self.labels[jax.vmap(lambda k: jax.random.randint(k, (), 0, len(self.labels)))(keys)]
        noise = temperature * (NOISE if labels.shape[1] else 1.0)
        y = noise * normal_by_index(key, indices, self.gaussian.mean.shape[0])
        step = 0.5 * math.pi / SAMPLE_STEPS

        def slope(y: Array, angle: Array) -> Array:
            free = self.velocity(y, angle, self.unlabeled)
            if not labels.shape[1]:
                return free
            return free + self.guidance * (self.velocity(y, angle, labels) - free)

        def one(number: Array, y: Array) -> Array:
            middle = y + 0.5 * step * slope(y, step * number)
            return y + step * slope(middle, step * (number + 0.5))

        y = lax.fori_loop(0, SAMPLE_STEPS, one, y)
        return self.gaussian.mean[None] + y @ self.gaussian.root.T

    def log_density(self, codes: Float[Array, "n z"]) -> Float[Array, " n"]:
        """Of the flow without labels, by the instantaneous change of variables (Chen et al. 2018, equation 8).

        The velocity's trace is exact for codes of at most `EXACT_TRACE` numbers. Of longer ones it is estimated with
        `PROBES` fixed random signs (Grathwohl et al. 2019), without bias.
        """
        size = codes.shape[1]
        y = jnp.linalg.solve(self.gaussian.root, (codes - self.gaussian.mean[None]).T).T
        exact = size <= EXACT_TRACE
        probes = jnp.eye(size) if exact else jax.random.rademacher(named_key(0, "trace"), (PROBES, size), jnp.float32)

        def slope(y: Array, angle: Array) -> tuple[Array, Array]:
            """The velocity and its trace."""
            velocity, along = jax.linearize(lambda y: self.velocity(y, angle, self.unlabeled), y)
            each = lax.map(lambda probe: jnp.sum(along(jnp.broadcast_to(probe, y.shape)) * probe[None], axis=1), probes)
            return velocity, jnp.sum(each, axis=0) / (1 if exact else PROBES)

        step = 0.5 * math.pi / DENSITY_STEPS

        def one(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            y, change = carry
            angle = 0.5 * math.pi - step * number
            middle = y - 0.5 * step * slope(y, angle)[0]
            velocity, trace = slope(middle, angle - 0.5 * step)
            return y - step * velocity, change + step * trace

        y, change = lax.fori_loop(0, DENSITY_STEPS, one, (y, jnp.zeros(len(codes))))
        scale = jnp.linalg.slogdet(self.gaussian.root)[1]
        return -0.5 * jnp.sum(jnp.square(y) + math.log(2 * math.pi), axis=1) - change - scale

    def to_arrays(self) -> dict[str, np.ndarray]:  # noqa: D102
        params = {f"params/{name}": np.asarray(leaf) for name, leaf in flatten_dict(self.params, sep="/").items()}
        others = {**self.gaussian._asdict(), "labels": self.labels, "shape": self.network.code_shape}
        return params | {name: np.asarray(part) for name, part in others.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "FlowPrior":  # noqa: D102
        params = {name.removeprefix("params/"): jnp.asarray(arrays[name]) for name in arrays if "params/" in name}
        gaussian = Gaussian(jnp.asarray(arrays["mean"]), jnp.asarray(arrays["root"]))
        width = arrays["params/Dense_1/kernel"].shape[1]  # of the version that fitted it
        network = dataclasses.replace(network_for(tuple(arrays["shape"].tolist())), width=width)
        labels = jnp.asarray(arrays["labels"])
        return cls(gaussian, unflatten_dict(params, sep="/"), labels, network, _guidance(labels))


def network_for(code_shape: tuple[int, ...]) -> Velocity:
    """The network for codes of a shape."""
    if len(code_shape) > 1:
        return Velocity(code_shape, GRID_WIDTH, GRID_BLOCKS)
    return Velocity(code_shape, WIDTH, BLOCKS)


def _guidance(labels: Float[Array, "m k"]) -> float:
    """`GUIDANCE` where all labels are binary. Guided by other numbers, more samples leave the range of the data."""
    values = [np.unique(column[~np.isnan(column)]) for column in np.asarray(labels).T]
    return GUIDANCE if all(len(found) <= 2 for found in values) else 1.0


def _whitened(
    posterior_mean: Float32[np.ndarray, "n z"],
    log_variance: Float32[np.ndarray, "n z"],
    labels: Float32[np.ndarray, "n k"],
    *,
    mean: Float32[np.ndarray, " z"],
    inverse: Float32[np.ndarray, "z z"],
) -> flow_fit.Codes:
    """Codes for a fit, as many as `MAX_NUMBERS` allows."""
    rows = slice(max(1, MAX_NUMBERS // len(mean)))
    whitened = (posterior_mean[rows] - mean[None]) @ inverse.T
    return flow_fit.Codes(whitened, np.exp(0.5 * log_variance[rows]), labels[rows], inverse)
