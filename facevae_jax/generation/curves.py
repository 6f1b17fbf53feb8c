"""Edits that bend, fitted to a trained model's labelled latents and kept in the run's folder."""

import contextlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Literal

import numpy as np

from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer
from facevae_jax.generation.directions import file_name, folder_of, kept_attributes, labelled_latents
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.curves import AttributeMap, Curve, Perceptron, fit_attribute_map
from facevae_jax.latents.directions import Whitening

METHOD: Literal["curve"] = "curve"
FORMAT = 2  # of the files: another where their numbers come to mean something else
VECTORS = ("low", "high", "std", "scores", "gains")
NETWORKS = ("to_latents", "read")


def curve_of(trained: TrainedVAE, attribute: str, *, keep: Sequence[str] = ()) -> Curve:
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
    path = folder_of(trained) / f"{file_name(METHOD, 'of', names)}.npz"
    found = _read(path, names)
    if found is None:
        given = labelled_latents(trained, names)
        found = fit_attribute_map(given.draws, given.whitening, given.labels)
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs time only
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, found)
    if not found.gains[names.index(attribute)]:
        raise UserError(
            f"--attribute={attribute}: no change of it shows in the latents: take --direction=mean, or train longer."
        )
    return Curve(attribute, found)


def _write(path: pathlib.Path, found: AttributeMap) -> None:
    arrays = {name: getattr(found, name) for name in VECTORS}
    arrays |= {"whitening_mean": found.whitening.mean, "whitening_root": found.whitening.root}
    arrays["facts"] = np.array(json.dumps({"format": FORMAT, "images": found.images, "names": found.names}))
    for name in NETWORKS:
        network: Perceptron = getattr(found, name)
        arrays |= {f"{name}_slope": network.slope, f"{name}_intercept": network.intercept}
        for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            arrays |= {f"{name}_weight_{layer}": weight, f"{name}_bias_{layer}": bias}
    with atomic_writer(path) as file:
        np.savez(file, **arrays)


def _read(path: pathlib.Path, names: tuple[str, ...]) -> AttributeMap | None:
    """What an earlier call kept; None where there is nothing whole that fits."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(str(arrays["facts"]))
        if facts["format"] != FORMAT or tuple(facts["names"]) != names:
            return None
        whitening = Whitening(arrays["whitening_mean"], arrays["whitening_root"])
        to_latents, read = (_network(arrays, name) for name in NETWORKS)
        low, high, std, scores, gains = (arrays[name] for name in VECTORS)
        return AttributeMap(
            names, to_latents, read, whitening, low, high, std, scores, gains, images=int(facts["images"])
        )
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _network(arrays: dict[str, np.ndarray], name: str) -> Perceptron:
    layers = range(sum(key.startswith(f"{name}_weight_") for key in arrays))
    weights, biases = (tuple(arrays[f"{name}_{kind}_{layer}"] for layer in layers) for kind in ("weight", "bias"))
    return Perceptron(weights, biases, arrays[f"{name}_slope"], arrays[f"{name}_intercept"])
