"""Variational autoencoders of human faces in JAX and Flax.

    import facevae_jax

    model = facevae_jax.load("/tmp/quickstart")    # a run's workdir, or an exported model
    faces = model.sample(16)                       # uint8 [16, R, R, 3]

The public names:

    prepare        make a dataset from images
    train          train a model, or resume a run
    evaluate       score a trained model
    load           load a trained model
    read_faces     read photographs for a model
    RunConfig      all settings of a run
    TrainedModel   what `load` returns

`facevae_jax.configs` holds the configs that `--config=NAME` finds. `python -m facevae_jax` lists the commands.
"""

import contextlib
import importlib
import os
import resource
import signal
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Below a limit on the size of files Python writes half of a compiled module, and every later import of it fails.
_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
if _limit != resource.RLIM_INFINITY:
    sys.dont_write_bytecode = True
    _compiled = __spec__.cached or ""
    with contextlib.suppress(OSError):  # Python compiled this module before it ran
        if os.path.getsize(_compiled) >= _limit:  # noqa: PTH202 - pathlib takes long to import
            os.unlink(_compiled)  # noqa: PTH108

# Ctrl-C while a command imports ends it at once, without a traceback; `command_line.run` handles it from then on.
_is_command = ("-m", __name__) in (
    (a, b.partition(".")[0]) for a, b in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
)
if sys.argv[:1] == ["-m"] and _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Imported on first use: `import facevae_jax`, and a command with a mistyped flag, should not wait for JAX.
_MODULES = {
    "RunConfig": "facevae_jax.config",
    "TrainedModel": "facevae_jax.trained.model",
    "evaluate": "facevae_jax.metrics.scores",
    "load": "facevae_jax.trained.loading",
    "prepare": "facevae_jax.prepare",
    "read_faces": "facevae_jax.data.sources.photographs",
    "train": "facevae_jax.api",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]


class _Package(types.ModuleType):
    """Keeps `facevae_jax.prepare` a function: importing the command's module would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
