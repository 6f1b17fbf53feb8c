"""What a score was computed on: two scores compare only where all of it is the same."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from facevae_jax.latents.temperature import Temperature
from facevae_jax.metrics.frechet import Extractor, features_of
from facevae_jax.trained.artifacts import short_hash
from facevae_jax.trained.model import TrainedModel

PROBES = 4  # images whose features name an extractor
DIGITS = 3  # of the features, in the name: other machines differ in the last ones


def protocol(
    trained: TrainedModel,
    *,
    split: str,
    count: int,
    prior: str,
    seed: int,
    features: str,
    temperature: Temperature = 1.0,
) -> dict[str, Any]:
    """Of samples compared with the first `count` images of a split by some features."""
    return {
        "data": f"{trained.dataset.name} {short_hash(trained.dataset.fingerprint)}",
        "resolution": trained.resolution,
        **trained.dataset.preparation,
        "split": split,
        "images": count,
        "features": features,
        "prior": prior,
        "temperature": {str(resolution): number for resolution, number in temperature.items()}  # as JSON has it
        if isinstance(temperature, Mapping)
        else temperature,
        "seed": seed,
    }


def named_features(name: str, extract: Extractor, *, resolution: int) -> str:
    """The name of an extractor, with a hash of what it gives for random images: other weights are other features."""
    images = np.random.default_rng(0).integers(0, 256, (PROBES, resolution, resolution, 3), np.uint8)
    found = features_of(extract, [images])
    scale = np.abs(found).max() or 1.0
    return f"{name} {hashlib.sha256(np.round(found / scale, DIGITS).tobytes()).hexdigest()[:12]}"


def differing(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys that differ, with their values; a key that one lacks has None there."""
    keys = dict.fromkeys(key for found in protocols for key in found)
    values = {key: [found.get(key) for found in protocols] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
