"""Priors over codes by name. A new one is a class, whose methods are those of `base.Prior`, and a line in `PRIORS`.

Nothing here imports jax, so that a command can check its flags before it does.
"""

import pkgutil
from typing import Any

PRIORS = {
    "standard": "facevae_jax.latents.priors.gaussian:StandardPrior",
    "gaussian": "facevae_jax.latents.priors.gaussian:GaussianPrior",
    "mixture": "facevae_jax.latents.priors.mixture:MixturePrior",
    "flow": "facevae_jax.latents.priors.flow:FlowPrior",
}
STANDARD, GAUSSIAN, FLOW = "standard", "gaussian", "flow"


def prior_class(name: str) -> Any:
    """The class of a prior, imported when it is asked for."""
    return pkgutil.resolve_name(PRIORS[name])
