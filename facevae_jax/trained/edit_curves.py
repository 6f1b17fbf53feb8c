"""Curved edits: along the mean latents of faces as an attribute grows; fitted to labelled codes and kept as artifacts.

A straight direction is the best line through those means. As hair grows longer or a mouth opens, other pixels change at
every step, so the means lie on a curve. Here a small network learns them: g(a) is the mean latent of faces with
attributes a. Another network predicts the attributes a of a latent z, which is edited to z + g(a + d) - g(a).
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from facevae_jax.core.errors import UserError
from facevae_jax.latents.directions import READABLE, Labels, Whitening, known_to_all
from facevae_jax.trained.directions import kept_attributes, labelled_codes
from facevae_jax.trained.model import TrainedModel

METHOD: Literal["curve"] = "curve"
VECTORS = ("low", "high", "std", "scores", "gains")
NETWORKS = ("to_latents", "read")
HIDDEN = (128, 128)
ALPHA = 1e-3  # L2 penalty of the weights
MAX_EPOCHS, PATIENCE = 200, 8  # epochs; PATIENCE: without a better score on the held-out tenth
HELD_OUT = 0.1
MAX_GAIN = 3.0  # an edit cannot compensate where the latents hold less than a third of an attribute
SMALLEST_CHANGE = 0.02  # of the predicted attribute, in standard deviations; below it an edit does nothing
GAUGED = 1_000  # faces that the gain is measured on


class Perceptron(NamedTuple):
    """Dense layers with tanh between them, plus a linear skip connection."""

    weights: tuple[Float[np.ndarray, "i o"], ...]
    biases: tuple[Float[np.ndarray, " o"], ...]
    slope: Float[np.ndarray, "i o"]
    intercept: Float[np.ndarray, " o"]

    def __call__(self, x: Float[np.ndarray, "n i"]) -> Float[np.ndarray, "n o"]:
        """The output for each row."""
        y = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            y = np.tanh(y @ weight + bias)
        return x @ self.slope + self.intercept + y @ self.weights[-1] + self.biases[-1]


def fit_perceptron(x: Float[np.ndarray, "n i"], y: Float[np.ndarray, "n o"]) -> Perceptron:
    """The mean of y for each x, by least squares: a linear map first, then a network for its residual.

    Args:
      x: of about unit variance.
      y: of about unit variance.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor  # takes a second to import

    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    line = np.linalg.lstsq(design, y, rcond=None)[0]
    rest = y - design @ line
    network = MLPRegressor(
        hidden_layer_sizes=HIDDEN,
        activation="tanh",
        alpha=ALPHA,
        batch_size=max(1, min(256, int((1 - HELD_OUT) * len(x)))),
        early_stopping=True,
        max_iter=MAX_EPOCHS,
        n_iter_no_change=PATIENCE,
        random_state=0,
        validation_fraction=HELD_OUT,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stopping decides
        network.fit(x, rest if rest.shape[1] > 1 else rest[:, 0])
    weights, biases = network.coefs_, network.intercepts_
    return Perceptron(
        tuple(w.astype(np.float32) for w in weights),
        tuple(b.astype(np.float32) for b in biases),
        line[:-1].astype(np.float32),
        line[-1].astype(np.float32),
    )


class AttributeMap(NamedTuple):
    """Networks from latents to attributes, and from attributes to the mean latents of such faces."""

    names: tuple[str, ...]
    to_latents: Perceptron  # standardized attributes to whitened latents
    read: Perceptron  # whitened latents to standardized attributes
    whitening: Whitening
    low: Float[np.ndarray, " a"]  # smallest and largest value of each attribute in the data, standardized
    high: Float[np.ndarray, " a"]
    std: Float[np.ndarray, " a"]  # of the labels
    scores: Float[np.ndarray, " a"]  # R² of the predictions for held-out latents
    gains: Float[np.ndarray, " a"]  # steps that change the predicted attribute by one standard deviation; 0: none does
    images: int  # that it was fitted to

    def attributes(self, latents: Float[np.ndarray, "n z"]) -> Float[np.ndarray, "n a"]:
        """The standardized attributes that are predicted for latents."""
        return self.read(self.whitening.whiten(latents))

    def move(
        self, latents: Float[np.ndarray, "n z"], number: int, steps: Float[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n z"]:
        """z + g(a + step) - g(a), steps in standard deviations of attribute `number`; 0 gives the latent exactly."""
        here = self.attributes(latents).clip(self.low, self.high)
        there = here.copy()
        there[:, number] += steps
        moved = (self.to_latents(there) - self.to_latents(here)) @ self.whitening.root.T
        return (latents + moved).astype(np.float32)


class Curve(NamedTuple):
    """A curved edit of one attribute, with the interface of a `Direction`."""

    attribute: str
    map: AttributeMap  # of it and of the attributes that stay unchanged

    def edit(self, latent: Float[np.ndarray, " z"], alphas: Sequence[float]) -> Float32[np.ndarray, "n z"]:
        """The face with its attribute changed by each alpha, in standard deviations; 0 gives the latent exactly."""
        number = self.map.names.index(self.attribute)
        steps = self.map.gains[number] * np.asarray(alphas, np.float64)
        return self.map.move(np.repeat(latent[None], len(steps), axis=0), number, steps)

    @property
    def score(self) -> float:
        """R² of the attribute's predictions for held-out latents."""
        return float(self.map.scores[self.map.names.index(self.attribute)])

    def describe(self) -> str:
        """One line to print."""
        number = self.map.names.index(self.attribute)
        others = [name for name in self.map.names if name != self.attribute]
        kept = f", keeping {', '.join(others)}" if others else ""
        hidden = "; the latents hardly encode it, so edits change other things"
        return (
            f"{self.attribute} by curve{kept}: R² {self.score:.2f} (chance 0.00) from {self.map.images:,} images; "
            f"alpha 1 is {self.map.std[number]:.3g} of it{hidden if self.score < READABLE else ''}"
        )


def fit_attribute_map(
    latents: Float[np.ndarray, "n z"], whitening: Whitening, labels: Sequence[Labels]
) -> AttributeMap:
    """The networks for some attributes.

    Args:
      latents: a draw from the posterior of each image.
      whitening: of the aggregate posterior.
      labels: of all attributes; images that lack one are left out.

    Raises:
      UserError: too few labels, or a label that is the same for all images.
    """
    known = known_to_all(labels)
    values = np.stack([label.values[known] for label in labels], axis=1).astype(np.float64)
    std = values.std(axis=0)
    standard = ((values - values.mean(axis=0)) / std).astype(np.float32)
    drawn = latents[known]
    whitened = whitening.whiten(drawn).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(whitened))
    held_out, fitted = np.split(order, [int(HELD_OUT * len(order))])
    read = fit_perceptron(whitened[fitted], standard[fitted])
    errors = np.square(read(whitened[held_out]) - standard[held_out]).mean(axis=0)
    found = AttributeMap(
        names=tuple(label.name for label in labels),
        to_latents=fit_perceptron(standard, whitened),
        read=read,
        whitening=whitening,
        low=standard.min(axis=0),
        high=standard.max(axis=0),
        std=std,
        scores=1 - errors / np.maximum(standard[held_out].var(axis=0), SMALLEST_CHANGE),
        gains=np.ones(len(labels)),
        images=len(drawn),
    )
    some = order[:GAUGED]
    gains = [_gain(found, number, drawn[some], standard[some]) for number in range(len(labels))]
    return found._replace(gains=np.array(gains))


def _gain(
    found: AttributeMap, number: int, latents: Float[np.ndarray, "n z"], standard: Float[np.ndarray, "n a"]
) -> float:
    """The factor on a step that makes the predicted attribute change by the step.

    Latents encode an attribute only in part, and mean latents change only by that part. The factor is measured by
    giving each face the attribute of another one, so that no face is moved to where there are none: out of range, or
    halfway between wearing glasses and not.
    """
    here = found.attributes(latents)[:, number]
    steps = np.roll(standard[:, number], 1) - here
    moved = found.attributes(found.move(latents, number, steps))[:, number]
    change = float(np.sum(steps * (moved - here)) / np.sum(np.square(steps)))
    return min(1.0 / change, MAX_GAIN) if change > SMALLEST_CHANGE else 0.0


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
    artifact = f"curve-{METHOD}-{'+'.join(names)}"
    kept = trained.artifacts.get(artifact)
    if kept is not None:
        found = _from_arrays(kept.arrays, names, images=kept.facts["images"])
    else:
        found = fit_attribute_map(*labelled_codes(trained, names))
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
