"""Attribute directions: how latents change as a label grows, and the length of a standard deviation.

`mean` is the difference between the mean latents with and without the attribute (the paper's), or the slope of the
latents on a continuous one. `regression` is the normal of a logistic or ridge regression on whitened latents, mapped
back so that a step along it is the shortest one, in Mahalanobis distance, that changes the prediction by as much (the
pattern of a filter, Haufe et al. 2014). For a single attribute the two are nearly equal; they differ in how they keep
other attributes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from facevae_jax.core.errors import UserError
from facevae_jax.latents.moments import Moments

EditMethod = Literal["mean", "regression"]
METHODS: tuple[EditMethod, ...] = ("mean", "regression")
FOLDS = 5
MIN_IMAGES = 20  # with the label, and of each class of a binary one; with fewer a direction is noise
READABLE = 0.05  # score above chance from which an attribute counts as learned
RIDGE = 1.0  # of whitened, unit-variance latents
SMALLEST_REST = 0.03  # part of a direction or label that must remain after keeping others


class Whitening(NamedTuple):
    """Whitens latents by the mean and covariance of the aggregate posterior, the mean over images of q(z | x)."""

    mean: Float[np.ndarray, " z"]
    root: Float[np.ndarray, "z z"]  # lower triangular R: the covariance is R Rᵀ

    @classmethod
    def of(cls, moments: Moments) -> "Whitening":
        """From the moments of the aggregate posterior."""
        return cls(moments.mean, np.linalg.cholesky(moments.covariance))

    def whiten(self, latents: Float[np.ndarray, "n z"]) -> Float[np.ndarray, "n z"]:
        """R⁻¹ (z - m)."""
        return np.linalg.solve(self.root, (latents - self.mean).T).T


class Labels(NamedTuple):
    """The values of one label."""

    name: str
    binary: bool  # 0 or 1; else any number
    values: Float[np.ndarray, " n"]  # NaN where unknown


class Direction(NamedTuple):
    """A straight edit: w_new = w + alpha x eta, eta = std x vector."""

    attribute: str
    method: str
    kept: tuple[str, ...]  # attributes that it leaves unchanged
    vector: Float32[np.ndarray, " z"]  # of length 1
    std: float  # of the latents (draws from the posteriors) along the vector: the step of alpha = 1
    raw_norm: float  # length of the difference of the means, before orthogonalization
    counts: tuple[int, ...]  # images without and with the attribute; all images for a continuous one
    score: float  # cross-validated balanced accuracy; R² for a continuous attribute
    chance: float  # score of a constant prediction, 0.5 or 0
    attribute_std: float  # of the labels: about the change of the attribute for alpha = 1

    def edit(self, latent: Float[np.ndarray, " z"], alphas: Sequence[float]) -> Float32[np.ndarray, "n z"]:
        """w + alpha x eta for each alpha; alpha 0 gives w exactly."""
        steps = np.asarray(alphas, np.float64)[:, None] * self.std * self.vector
        return (latent + steps).astype(np.float32)

    def describe(self) -> str:
        """One line to print."""
        what = "balanced accuracy" if len(self.counts) == 2 else "R²"
        kept = f", keeping {', '.join(self.kept)}" if self.kept else ""
        hidden = "; the latents hardly encode it, so edits change other things"
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
      latents: a draw from the posterior of each image. Not the means: those of an inactive dimension hardly vary, so a
        regression would assign it an arbitrary weight.
      whitening: of the aggregate posterior.
      labels: of the attribute.
      keep: labels of attributes that stay unchanged. `mean`: the difference between faces that differ in the attribute
        alone, by a linear regression of the latents on all labels. `regression`: the normal is made orthogonal to the
        others' normals.
      method: see the module's docstring.

    Raises:
      UserError: too few labels, a label that is the same for all images, or nothing is left of the direction.
    """
    known = known_to_all((labels, *keep))
    values = labels.values[known].astype(np.float64)
    whitened = whitening.whiten(latents[known])
    names = ", ".join(other.name for other in keep)
    nothing_left = UserError(f"--keep={names}: nothing is left of the direction of {labels.name!r}: keep fewer.")
    if method == "mean":
        # A slope on the residual equals the slope on the label in a regression on all of them (Frisch & Waugh 1933).
        rest = _residual(values, [np.ones_like(values), *(other.values[known] for other in keep)])
        if rest.std() < SMALLEST_REST * values.std():
            raise nothing_left
        step = _slope(latents[known].astype(np.float64), rest)
    else:
        normal = _normal(whitened, values, labels.binary, method)
        others = [_normal(whitened, other.values[known], other.binary, method) for other in keep]
        rest = _residual(normal / np.linalg.norm(normal), others)
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
    """A mask of the images that have all of some labels.

    Raises:
      UserError: too few have one of them, or it is the same for all of these images.
    """
    known_to = [np.isfinite(label.values) for label in labels]
    known = np.all(known_to, axis=0)
    for label, mask in [*zip(labels, known_to, strict=True), *((label, known) for label in labels)]:
        values = label.values[mask]
        sizes = [int(np.sum(values == value)) for value in (0, 1)] if label.binary else [len(values)]
        if min(sizes) < MIN_IMAGES or not np.std(values):
            raise UserError(
                f"attribute {label.name!r}: {' and '.join(map(str, sizes))} images "
                f"{'without and with it' if label.binary else 'have the label'}; at least {MIN_IMAGES} are needed."
            )
    return known


def _slope(latents: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " z"]:
    """Change of the mean latent per unit of the label; for 0 and 1 the difference of the two means."""
    centered = values - values.mean()
    return latents.T @ centered / (centered @ centered)


def _normal(
    whitened: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"], binary: bool, method: EditMethod
) -> Float[np.ndarray, " z"]:
    if method == "mean":
        return _slope(whitened, values)
    from sklearn.linear_model import LogisticRegression, Ridge  # takes a second to import

    if not binary:
        return Ridge(RIDGE).fit(whitened, values).coef_
    # Balanced: otherwise the many images without a rare attribute would dominate its normal.
    return LogisticRegression(C=1 / RIDGE, class_weight="balanced", max_iter=200).fit(whitened, values).coef_[0]


def _residual(target: Float[np.ndarray, " n"], columns: Sequence[Float[np.ndarray, " n"]]) -> Float[np.ndarray, " n"]:
    """The part of a vector that is orthogonal to some others: the residual of a linear regression on them."""
    if not columns:
        return target
    design = np.stack(columns, axis=1)
    return target - design @ np.linalg.lstsq(design, target, rcond=None)[0]


def cross_validate(
    whitened: Float[np.ndarray, "n z"], values: Float[np.ndarray, " n"], binary: bool, method: EditMethod
) -> tuple[float, float]:
    """Cross-validated score of predictions from the projection on the direction, and the score of a constant one.

    A binary label is predicted by a threshold halfway between the classes' means, and scored by balanced accuracy; a
    number is predicted by a line, and scored by R².
    """
    from sklearn.metrics import balanced_accuracy_score, r2_score  # takes a second to import

    order = np.random.default_rng(0).permutation(len(values))
    predicted = np.empty(len(values))
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        if not np.std(values[rest]):  # all that differ are in this fold
            predicted[fold] = values[rest[0]]
            continue
        projected = whitened @ _normal(whitened[rest], values[rest], binary, method)
        if binary:
            threshold = np.mean([projected[rest][values[rest] == value].mean() for value in (0, 1)])
            predicted[fold] = projected[fold] > threshold
        else:
            predicted[fold] = np.polyval(np.polyfit(projected[rest], values[rest], 1), projected[fold])
    return (balanced_accuracy_score(values, predicted), 0.5) if binary else (r2_score(values, predicted), 0.0)
