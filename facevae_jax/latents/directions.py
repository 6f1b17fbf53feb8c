"""Attribute directions: which way latents go as a label grows, and how far a standard deviation is.

`mean` describes where the faces with an attribute are: the difference of the means of those with and without it (the
paper's), of a continuous one the slope of the latents on it. `regression` asks what tells the attribute: the normal of
a logistic or ridge regression on whitened latents, brought back so that a step along it is the mildest one, in the
latents' own Mahalanobis distance, that changes the prediction by so much (the pattern of a filter, Haufe et al. 2014).
For one attribute alone the two are nearly the same; they differ in how they keep others as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from facevae_jax.errors import UserError

EditMethod = Literal["mean", "regression"]
METHODS: tuple[EditMethod, ...] = ("mean", "regression")
FOLDS = 5
MIN_IMAGES = 20  # with a label, and of each class of a binary one, below which a direction is noise
READABLE = 0.05  # above chance, below which an attribute counts as not learnt
RIDGE = 1.0  # of whitened, unit-variance latents
SMALLEST_REST = 0.03  # of a direction or a label that keeping others leaves; below, there is nothing to move along


class Whitening(NamedTuple):
    """Mean and covariance of the aggregate posterior, q(z) = mean over images of q(z | x)."""

    mean: Float[np.ndarray, " z"]
    root: Float[np.ndarray, "z z"]  # lower triangular R: the covariance is R Rᵀ

    @classmethod
    def of(cls, mean: Float[np.ndarray, "n z"], log_variance: Float[np.ndarray, "n z"]) -> "Whitening":
        """From the posteriors of many images.

        Their own variances belong to it: they keep a dimension that carries nothing, whose means hardly differ, from
        being blown up.
        """
        mean = mean.astype(np.float64)
        covariance = np.cov(mean.T).reshape(mean.shape[1], -1) + np.diag(np.exp(log_variance).mean(axis=0))
        return cls(mean.mean(axis=0), np.linalg.cholesky(covariance))

    def whiten(self, latents: Float[np.ndarray, "n z"]) -> Float[np.ndarray, "n z"]:
        """R⁻¹ (z - m)."""
        return np.linalg.solve(self.root, (latents - self.mean).T).T


class Labels(NamedTuple):
    """One label of many images."""

    name: str
    binary: bool  # 0 and 1; else a number
    values: Float[np.ndarray, " n"]  # NaN where unknown


class Direction(NamedTuple):
    """Where and how far to move for an attribute: w_new = w + alpha x eta, eta = std x vector."""

    attribute: str
    method: str
    kept: tuple[str, ...]  # attributes that it is to leave as they are
    vector: Float32[np.ndarray, " z"]  # of length 1
    std: float  # what alpha counts: the standard deviation of the latents, draws from the posteriors, along the vector
    raw_norm: float  # before orthogonalisation: length of the difference of the means, in latent units
    counts: tuple[int, ...]  # images without and with the attribute; of a continuous one, all
    score: float  # cross-validated: the mean of the two classes' accuracies; of a continuous attribute, R²
    chance: float  # the score of always giving the same answer, 0.5 or 0
    attribute_std: float  # of the labels: about what alpha = 1 changes the attribute by

    def edit(self, latent: Float[np.ndarray, " z"], alphas: Sequence[float]) -> Float32[np.ndarray, "n z"]:
        """w + alpha x eta for each alpha; alpha 0 gives w exactly."""
        steps = np.asarray(alphas, np.float64)[:, None] * self.std * self.vector
        return (latent + steps).astype(np.float32)

    def describe(self) -> str:
        """One line."""
        what = "balanced accuracy" if len(self.counts) == 2 else "R²"
        kept = f", keeping {', '.join(self.kept)}" if self.kept else ""
        hidden = "; it can hardly be read off the latents, so that edits change other things"
        return (
            f"{self.attribute} by {self.method}{kept}: {what} {self.score:.2f} (chance {self.chance:.2f}) from "
            f"{' and '.join(f'{count:,}' for count in self.counts)} images; alpha 1 is {self.std:.2f} along it"
            f"{hidden if self.score < self.chance + READABLE else ''}"
        )


def fit_direction(
    latents: Float[np.ndarray, "n z"],
    whitening: Whitening,
    labels: Labels,
    keep: Sequence[Labels],
    *,
    method: EditMethod,
) -> Direction:
    """The direction of an attribute.

    Args:
      latents: a draw from the posterior of each image. Not the means: of a dimension that carries nothing they hardly
        differ, and a regression would give it all the weight that it likes.
      whitening: of the aggregate posterior.
      labels: of the attribute.
      keep: labels of attributes that the direction shall leave as they are. `mean`: the means are those of faces that
        differ in the attribute alone, by a linear regression of the latents on all the labels. `regression`: the
        normal is made orthogonal to those of the others.
      method: see the head of this module.

    Raises:
      UserError: too few labels, or one that is the same for all; nothing is left of the direction.
    """
    known = known_to_all((labels, *keep))
    values = labels.values[known].astype(np.float64)
    whitened = whitening.whiten(latents[known])
    names = ", ".join(other.name for other in keep)
    nothing_left = UserError(f"--keep={names}: nothing is left of the direction of {labels.name!r}: keep fewer.")
    if method == "mean":
        rest = _residual(values, [other.values[known] for other in keep])
        if rest.std() < SMALLEST_REST * values.std():
            raise nothing_left
        step = _slope(latents[known].astype(np.float64), rest)
    else:
        normal = _normal(whitened, values, labels.binary, method)
        others = [_normal(whitened, other.values[known], other.binary, method) for other in keep]
        rest = _orthogonalise(normal / np.linalg.norm(normal), others)
        if np.linalg.norm(rest) < SMALLEST_REST:
            raise nothing_left
        step = whitening.root @ rest
    vector = step / np.linalg.norm(step)
    score, chance = cross_validate(whitened, values, labels.binary, method)
    classes = tuple(int(np.sum(values == value)) for value in (0, 1)) if labels.binary else (len(values),)
    raw = _slope(latents[known].astype(np.float64), values)
    return Direction(
        attribute=labels.name,
        method=method,
        kept=tuple(other.name for other in keep),
        vector=vector.astype(np.float32),
        std=float(np.linalg.norm(whitening.root.T @ vector)),
        raw_norm=float(np.linalg.norm(raw)),
        counts=classes,
        score=score,
        chance=chance,
        attribute_std=float(values.std()),
    )


def known_to_all(labels: Sequence[Labels]) -> np.ndarray:
    """Which images have all of some labels.

    Raises:
      UserError: too few have one of them, or it is the same for all of those that have the others.
    """
    known = np.all([_known(label) for label in labels], axis=0)
    for label in labels:
        _known(label._replace(values=np.where(known, label.values, np.nan)))
    return known


def _known(labels: Labels) -> np.ndarray:
    """Which images have the label.

    Raises:
      UserError: too few have, or it is the same for all.
    """
    known = np.isfinite(labels.values)
    values = labels.values[known]
    sizes = [int(np.sum(values == value)) for value in (0, 1)] if labels.binary else [len(values)]
    if min(sizes) < MIN_IMAGES or not np.std(values):
        raise UserError(
            f"attribute {labels.name!r}: {' and '.join(map(str, sizes))} images "
            f"{'without and with it' if labels.binary else 'have the label'}; {MIN_IMAGES} at least are needed."
        )
    return known


def _slope(latents: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " z"]:
    """Change of the mean latent for a label that grows by 1: of 0 and 1, the difference of the two means."""
    centred = values - values.mean()
    return latents.T @ centred / (centred @ centred)


def _normal(
    whitened: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"], binary: bool, method: EditMethod
) -> Float[np.ndarray, " z"]:
    if method == "mean":
        return _slope(whitened, values)
    from sklearn.linear_model import LogisticRegression, Ridge  # which takes a second to import

    if not binary:
        return Ridge(RIDGE).fit(whitened, values).coef_
    # Balanced, or a rare attribute's normal would be bent by where the many without it are.
    return LogisticRegression(C=1 / RIDGE, class_weight="balanced", max_iter=200).fit(whitened, values).coef_[0]


def _residual(values: Float[np.ndarray, " n"], others: Sequence[Float[np.ndarray, " n"]]) -> Float[np.ndarray, " n"]:
    """What a linear regression of a label on others leaves of it.

    The slope of anything on it is that on the label in a regression on all of them (Frisch & Waugh 1933).
    """
    design = np.stack([np.ones_like(values), *others], axis=1)
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def _orthogonalise(
    vector: Float[np.ndarray, " z"], others: Sequence[Float[np.ndarray, " z"]]
) -> Float[np.ndarray, " z"]:
    """What is left of a vector without its part in the span of the others."""
    if not others:
        return vector
    basis, _ = np.linalg.qr(np.stack(others, axis=1))
    return vector - basis @ (basis.T @ vector)


def cross_validate(
    whitened: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"], binary: bool, method: EditMethod
) -> tuple[float, float]:
    """Score of the attribute read off latents that its direction was not fitted to, and that of a constant answer.

    The projection on the direction is all that is looked at: the mean of the two classes' accuracies by a threshold
    halfway between their means, or R² of a line.
    """
    order = np.random.default_rng(0).permutation(len(values))
    right: list[Any] = []
    score_of: Callable[..., np.ndarray] = _classify if binary else _predict
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        normal = _normal(whitened[rest], values[rest], binary, method)
        right.append(score_of(whitened[rest] @ normal, values[rest], whitened[fold] @ normal, values[fold]))
    if binary:
        correct, truth = np.concatenate(right), values[order]
        return float(np.mean([correct[truth == value].mean() for value in (0, 1)])), 0.5
    return float(1 - np.concatenate(right).mean() / values.var()), 0.0


def _classify(fitted: Any, fitted_values: Any, at: Any, values: Any) -> np.ndarray:
    threshold = (fitted[fitted_values == 0].mean() + fitted[fitted_values == 1].mean()) / 2
    return (at > threshold) == (values == 1)


def _predict(fitted: Any, fitted_values: Any, at: Any, values: Any) -> np.ndarray:
    slope, intercept = np.polyfit(fitted, fitted_values, 1)
    return np.square(slope * at + intercept - values)
