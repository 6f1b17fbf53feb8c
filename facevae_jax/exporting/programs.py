"""`encoder.stablehlo` and `decoder.stablehlo`: the model as programs that JAX runs without this package.

They are serialised by `jax.export` for batches of any size and for several platforms, with the parameters inside.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from facevae_jax.config import CHANNELS, RunConfig
from facevae_jax.errors import UserError
from facevae_jax.exporting.contents import check_file
from facevae_jax.models.vae import VAE, Execution, Posterior
from facevae_jax.training.restore import RestoredModel

ENCODER, DECODER = "encoder.stablehlo", "decoder.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "b"  # name of the symbolic dimension


class Programs(NamedTuple):
    """A model's two halves, compiled once for each size of a batch."""

    encode: Callable[[UInt8[Array, "b r r 3"]], Posterior]
    decode: Callable[[Float[Array, "b z"]], Float[Array, "b r r 3"]]  # in [0, 1]


def plain_model(config: RunConfig) -> VAE:
    """The model in the form whose shapes allow any batch; the CPU's other form cuts a batch into blocks."""
    return VAE(config.model, config.data.resolution, Execution("plain"), config.components)


def serialize_programs(restored: RestoredModel) -> dict[str, bytes]:
    """Contents of the two files, by name."""
    model, variables = (
        plain_model(restored.config),
        jax.device_get(restored.variables),
    )  # not bound to this machine's devices
    side = model.resolution
    (batch,) = jax.export.symbolic_shape(BATCH)

    def encoder(images: UInt8[Array, "b r r 3"]) -> tuple[Array, Array]:
        posterior: Any = model.apply(variables, images, method="encode")
        return (
            posterior.mean,
            posterior.log_variance,
        )  # a plain tuple: a class of ours would have to be there to read it

    def decoder(latents: Float[Array, "b z"]) -> Any:
        return model.apply(variables, latents, method="decode")

    images = jax.ShapeDtypeStruct((batch, side, side, CHANNELS), jnp.uint8)
    latents = jax.ShapeDtypeStruct((batch, restored.config.model.latent_dim), jnp.float32)
    exported = {ENCODER: (encoder, images), DECODER: (decoder, latents)}
    with _without_locations():
        return {
            name: bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(argument).serialize())
            for name, (function, argument) in exported.items()
        }


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the paths of source files on this machine out of programs that are given away."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read_programs(folder: pathlib.Path) -> Programs:
    """The StableHLO programs of an exported folder, to be called on arrays.

    Raises:
      UserError: a file is missing or damaged, or this version of JAX does not read it.
    """
    encoder, decoder = (_read(folder, name) for name in (ENCODER, DECODER))
    return Programs(jax.jit(lambda images: Posterior(*encoder.call(images))), jax.jit(decoder.call))


def _read(folder: pathlib.Path, name: str) -> jax.export.Exported:
    content = check_file(folder, name)
    try:
        return jax.export.deserialize(bytearray(content))
    except Exception as error:  # by its checksum it is whole: a version that JAX no longer or not yet reads
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / name} cannot be read by JAX {jax.__version__} ({reason}): export it again."
        ) from error
