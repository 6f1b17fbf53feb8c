"""Edits that bend: along the mean latents of faces as an attribute grows, wherever these lead.

A straight direction is the best line through those means. Where hair grows longer, or a mouth opens, other pixels
change at every step, so that the means lie on a curve which no line follows. Here a small network learns them: g(a),
the mean latent of faces with attributes a. A face with the latent z, whose attributes a another network reads off z,
is edited to z + g(a + d) - g(a).
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from facevae_jax.latents.directions import READABLE, Labels, Whitening, known_to_all

HIDDEN = (128, 128)
ALPHA = 1e-3  # L2 penalty of the weights
MAX_EPOCHS, PATIENCE = 200, 8  # of training; without a better score of the tenth that is held out
HELD_OUT = 0.1
MAX_GAIN = 3.0  # where less than a third of an attribute is in the latents, an edit cannot make up for it
SMALLEST_CHANGE = 0.02  # of what is read, in standard deviations, below which an edit does nothing
GAUGED = 1_000  # faces that the gain is found from


class Perceptron(NamedTuple):
    """A network of dense layers with tanh between them, and a linear way past them."""

    weights: tuple[Float[np.ndarray, "i o"], ...]
    biases: tuple[Float[np.ndarray, " o"], ...]
    slope: Float[np.ndarray, "i o"]
    intercept: Float[np.ndarray, " o"]

    def __call__(self, x: Float[np.ndarray, "n i"]) -> Float[np.ndarray, "n o"]:
        """What it gives for each row."""
        y = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            y = np.tanh(y @ weight + bias)
        return x @ self.slope + self.intercept + y @ self.weights[-1] + self.biases[-1]


def fit_perceptron(x: Float[np.ndarray, "n i"], y: Float[np.ndarray, "n o"]) -> Perceptron:
    """The mean of y for each x, by least squares: a line first, then a network for what it leaves.

    Args:
      x: of about unit variance.
      y: of about unit variance.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor  # which takes a second to import

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
        warnings.simplefilter("ignore", ConvergenceWarning)  # the score decides whether it is good enough
        network.fit(x, rest if rest.shape[1] > 1 else rest[:, 0])
    weights, biases = network.coefs_, network.intercepts_
    return Perceptron(
        tuple(w.astype(np.float32) for w in weights),
        tuple(b.astype(np.float32) for b in biases),
        line[:-1].astype(np.float32),
        line[-1].astype(np.float32),
    )


class AttributeMap(NamedTuple):
    """Attributes of faces from their latents, and the mean latents of faces from their attributes."""

    names: tuple[str, ...]
    to_latents: Perceptron  # standardised attributes to whitened latents
    read: Perceptron  # whitened latents to standardised attributes
    whitening: Whitening
    low: Float[np.ndarray, " a"]  # the least and the largest of each attribute in the data, standardised
    high: Float[np.ndarray, " a"]
    std: Float[np.ndarray, " a"]  # of the labels
    scores: Float[np.ndarray, " a"]  # R² of what is read off held-out latents
    gains: Float[np.ndarray, " a"]  # steps of a standard deviation that change what is read by one; 0: none does
    images: int  # that it was fitted to

    def attributes(self, latents: Float[np.ndarray, "n z"]) -> Float[np.ndarray, "n a"]:
        """The standardised attributes that are read off latents."""
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
    """How to move for an attribute from any face; for use in place of a `Direction`."""

    attribute: str
    map: AttributeMap  # of it and of the attributes that it is to leave as they are

    def edit(self, latent: Float[np.ndarray, " z"], alphas: Sequence[float]) -> Float32[np.ndarray, "n z"]:
        """The face with its attribute changed by each alpha, in standard deviations; 0 gives the latent exactly."""
        number = self.map.names.index(self.attribute)
        steps = self.map.gains[number] * np.asarray(alphas, np.float64)
        return self.map.move(np.repeat(latent[None], len(steps), axis=0), number, steps)

    @property
    def score(self) -> float:
        """R² of the attribute as it is read off held-out latents."""
        return float(self.map.scores[self.map.names.index(self.attribute)])

    def describe(self) -> str:
        """One line."""
        number = self.map.names.index(self.attribute)
        others = [name for name in self.map.names if name != self.attribute]
        kept = f", keeping {', '.join(others)}" if others else ""
        hidden = "; it can hardly be read off the latents, so that edits change other things"
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
      labels: of all the attributes; images without one of them are left out.

    Raises:
      UserError: too few labels, or one that is the same for all.
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
    """How much further to go than the attribute's own change, so that what is read changes by that.

    Latents hold an attribute but in part, and the mean latent of faces that have one more of it shows that part alone.
    Each face is given the attribute of another one, so that none is moved to where there are no faces: beyond the
    range, or between having glasses and not.
    """
    here = found.attributes(latents)[:, number]
    steps = np.roll(standard[:, number], 1) - here
    moved = found.attributes(found.move(latents, number, steps))[:, number]
    change = float(np.sum(steps * (moved - here)) / np.sum(np.square(steps)))
    return min(1.0 / change, MAX_GAIN) if change > SMALLEST_CHANGE else 0.0
