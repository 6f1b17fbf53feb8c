"""Variational autoencoders of human faces in JAX and Flax.

    import facevae_jax
    model = facevae_jax.load("/tmp/quickstart")    # a run's workdir, or an exported model
    faces = model.sample(16)                       # uint8 [16, R, R, 3]

`load` gives a `generation.trained.TrainedVAE`; `read_faces` reads photographs for it.
"""

from typing import Any

__version__ = "0.1.0"

_LAZY = {"load": "facevae_jax.generation.loading", "read_faces": "facevae_jax.generation.photographs"}


def __getattr__(name: str) -> Any:
    """`load` and `read_faces`, imported as they are asked for: a mistaken flag need not wait for jax."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
