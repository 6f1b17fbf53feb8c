"""Models by kind. A kind is one file with its settings (`Config`) and `build`; `models.api` is what it must offer."""

import importlib
from typing import Any, Protocol, runtime_checkable

KINDS = {
    "vae": "facevae_jax.models.vae",
    "autoencoder": "facevae_jax.models.vae",  # the same network without draws and without a KL divergence
    "autoencoder_kl": "facevae_jax.models.autoencoder",
    "hierarchical": "facevae_jax.models.hierarchical",
    "pca": "facevae_jax.models.pca",
}
DEFAULT = "vae"


@runtime_checkable
class Config(Protocol):
    """Settings of a model: a frozen dataclass."""

    @property
    def kind(self) -> str:
        """A key of `KINDS`."""
        ...

    def check_run(self, run: Any) -> None:
        """Raises a ValueError for settings of a `RunConfig` that this kind cannot take."""
        ...


def module_of(kind: str) -> Any:
    """The file of a kind, imported when it is asked for."""
    return importlib.import_module(KINDS[kind])


def config_class(kind: str) -> Any:
    """The dataclass with the settings of a kind."""
    return module_of(kind).Config


def fit_of(kind: str) -> Any:
    """`fit(config, images, progress=...)` of a kind whose parameters are computed, not trained; None for others."""
    return getattr(module_of(kind), "fit", None)
