"""`encoder.stablehlo` and `decoder.stablehlo`: the model as programs that JAX runs without this package.

`jax.export` serializes them for batches of any size and for several platforms, with the parameters inside.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.exporting.contents import check_file
from facevae_jax.models.api import Execution, Gaussian
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import make_model

ENCODER, DECODER = "encoder.stablehlo", "decoder.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "b"  # name of the symbolic dimension


class Programs(NamedTuple):
    """A model's two halves, compiled once for each size of a batch."""

    encode: Callable[[UInt8[Array, "b r r 3"]], Gaussian]
    decode: Callable[[Float[Array, "b ..."]], Float[Array, "b r r 3"]]  # in [0, 1]


def halves(restored: Restored) -> list[tuple[Callable[[Any], Any], jax.ShapeDtypeStruct]]:
    """Encoder and decoder as functions of arrays, each with its argument for batches of any size.

    Their convolutions are plain ones: the CPU's other form cuts a batch of known size into blocks.
    """
    model = make_model(restored.config, Execution("plain"))[0]
    variables = jax.device_get(restored.variables)  # constants of the programs, not bound to this machine's devices
    (batch,) = jax.export.symbolic_shape(BATCH)

    def apply(x: Array, method: str) -> Any:
        return model.apply(jax.tree.map(jnp.asarray, variables), x, method=method)

    def encoder(images: UInt8[Array, "b r r 3"]) -> tuple[Array, Array]:
        posterior = apply(images, "encode")
        return posterior.mean, posterior.log_variance  # a plain tuple: readers need no class of this package

    def decoder(codes: Float[Array, "b ..."]) -> Array:
        return apply(codes, "decode").mean

    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.uint8)
    codes = jax.ShapeDtypeStruct((batch, *model.code_shape), jnp.float32)
    return [(encoder, images), (decoder, codes)]


def serialize_programs(restored: Restored) -> dict[str, bytes]:
    """Contents of the two files, by name."""
    with _without_locations():
        return {
            name: bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(argument).serialize())
            for name, (function, argument) in zip((ENCODER, DECODER), halves(restored), strict=True)
        }


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of the programs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read_programs(folder: pathlib.Path) -> Programs:
    """The StableHLO programs of an exported folder, as functions of arrays.

    Raises:
      UserError: a file is missing or damaged, or this version of JAX cannot read it.
    """
    encoder, decoder = (_read(folder, name) for name in (ENCODER, DECODER))
    return Programs(jax.jit(lambda images: Gaussian(*encoder.call(images))), jax.jit(decoder.call))


def _read(folder: pathlib.Path, name: str) -> jax.export.Exported:
    content = check_file(folder, name)
    try:
        return jax.export.deserialize(bytearray(content))
    except Exception as error:  # the checksum is right: it is of a version that this JAX cannot read
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / name} cannot be read by JAX {jax.__version__} ({reason}): export it again."
        ) from error
