"""Edits that bend, fitted to a trained model's labelled codes and kept as artifacts."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from facevae_jax.core.errors import UserError
from facevae_jax.latents.directions import Whitening
from facevae_jax.latents.edit_curves import AttributeMap, Curve, Perceptron, fit_attribute_map
from facevae_jax.trained.directions import artifact_name, kept_attributes, labelled_codes
from facevae_jax.trained.model import TrainedModel

METHOD: Literal["curve"] = "curve"
VECTORS = ("low", "high", "std", "scores", "gains")
NETWORKS = ("to_latents", "read")


def curve_of(trained: TrainedModel, attribute: str, *, keep: Sequence[str] = ()) -> Curve:
    """The curve of an attribute; fitted once to the training split, which may take minutes, then read.

    Args:
      trained: the model.
      attribute: a name among the labels of the run's data.
      keep: attributes that are to stay as they are; `all` stands for every other one.

    Raises:
      UserError: there is no such attribute, or too few labels; no change of it shows in the latents; the run's data are
        not there.
    """
    # In one order: all curves that keep all others share the networks.
    names = tuple(sorted([attribute, *kept_attributes(trained, attribute, keep)]))
    artifact = artifact_name("curve", METHOD, names)
    kept = trained.artifacts.get(artifact)
    if kept is not None:
        found = _from_arrays(kept.arrays, names, images=kept.facts["images"])
    else:
        given = labelled_codes(trained, names)
        found = fit_attribute_map(given.draws, given.whitening, given.labels)
        trained.artifacts.put(artifact, _to_arrays(found), {"images": found.images})
    if not found.gains[names.index(attribute)]:
        raise UserError(f"--attribute={attribute}: the codes do not show it: use --direction=mean, or train longer.")
    return Curve(attribute, found)


def _to_arrays(found: AttributeMap) -> dict[str, np.ndarray]:
    arrays = {name: getattr(found, name) for name in VECTORS}
    arrays |= {"whitening_mean": found.whitening.mean, "whitening_root": found.whitening.root}
    for name in NETWORKS:
        network: Perceptron = getattr(found, name)
        arrays |= {f"{name}_slope": network.slope, f"{name}_intercept": network.intercept}
        for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            arrays |= {f"{name}_weight_{layer}": weight, f"{name}_bias_{layer}": bias}
    return arrays


def _from_arrays(arrays: dict[str, np.ndarray], names: tuple[str, ...], *, images: int) -> AttributeMap:
    """The inverse of `_to_arrays`."""
    whitening = Whitening(arrays["whitening_mean"], arrays["whitening_root"])
    networks: dict[str, Any] = {name: _network(arrays, name) for name in NETWORKS}
    vectors: dict[str, Any] = {name: arrays[name] for name in VECTORS}
    return AttributeMap(names=names, whitening=whitening, images=images, **networks, **vectors)


def _network(arrays: dict[str, np.ndarray], name: str) -> Perceptron:
    layers = range(sum(key.startswith(f"{name}_weight_") for key in arrays))
    weights, biases = (tuple(arrays[f"{name}_{kind}_{layer}"] for layer in layers) for kind in ("weight", "bias"))
    return Perceptron(weights, biases, arrays[f"{name}_slope"], arrays[f"{name}_intercept"])
