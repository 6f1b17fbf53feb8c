"""Figures of the latent space: KL by dimension, distribution and map of the codes, and the rate under each prior."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from facevae_jax.data.layouts.types import Attribute
from facevae_jax.inference import Encoded
from facevae_jax.latents.priors import STANDARD, prior_class
from facevae_jax.metrics.scores import active_units, kl_by_dimension, rate
from facevae_jax.reporting.page import (
    COLORS,
    FAINT,
    HEIGHT,
    SCALE,
    WIDTH,
    Block,
    Note,
    Picture,
    Table,
    chart,
    label,
    legend_below,
    logarithmic,
)
from facevae_jax.trained.codes import CodeTable
from facevae_jax.trained.model import TrainedModel
from facevae_jax.trained.ranking import best_first
from facevae_jax.training.evaluation import ACTIVE_VARIANCE

SHOWN_DIMENSIONS = 6  # with a histogram of their own
SHOWN_POINTS = 4_000  # of the map, at most
SHOWN_ATTRIBUTES = 4  # one map each
RANGE = 4.5  # of histograms, in standard deviations of the prior
BINS = 45


def by_activity(posterior: Encoded) -> list[int]:
    """Latent dimensions by the variance of their posterior means, the largest first."""
    return np.argsort(-posterior.mean.var(axis=0), kind="stable").tolist()


def dimensions(posterior: Encoded) -> list[Block]:
    """Sorted KL and variance of the means, and how many dimensions are active."""
    kl, variance = kl_by_dimension(posterior), posterior.mean.var(axis=0)
    size, active = len(kl), active_units(posterior)
    text = (
        f"{active} of {size} dimensions are active. All dimensions carry {kl.sum():,.2f} nats; the first "
        f"{int(np.searchsorted(np.cumsum(np.sort(kl)[::-1]), 0.9 * kl.sum())) + 1} carry 90% of it."
    )
    first, second = Figure(), Figure()
    axes = first.add_subplot(title="KL by dimension", xlabel="dimension, by rank", ylabel="KL, nats")
    axes.stairs(np.sort(kl)[::-1], np.arange(size + 1) + 0.5, fill=True, color=COLORS[0])
    axes.set_ylim(bottom=0)
    _whole_ticks(axes)
    ranked = np.maximum(np.sort(variance)[::-1], 1e-8)  # a logarithmic axis has no 0
    axes = second.add_subplot(title="Active units", xlabel="dimension, by rank", ylabel="variance of the means")
    logarithmic(axes)
    axes.stairs(ranked, np.arange(size + 1) + 0.5, baseline=None, color=COLORS[0])
    axes.axhline(ACTIVE_VARIANCE, color=COLORS[1], linestyle="--")
    above: Any = {"xytext": (0, 3), "textcoords": "offset points"}
    axes.annotate(f"active above {ACTIVE_VARIANCE}", (0.5, ACTIVE_VARIANCE), color=COLORS[1], fontsize=8, **above)
    _whole_ticks(axes)
    return [
        Note(text),
        chart(first, alt=f"KL of {size} dimensions, from {kl.max():.3g} down to {kl.min():.3g} nats"),
        chart(second, alt=f"Variance of the posterior means of {size} dimensions: {active} are active"),
    ]


def _whole_ticks(axes: Any) -> None:
    axes.locator_params(axis="x", integer=True, nbins=6)


def histograms(trained: TrainedModel, posterior: Encoded, *, seed: int) -> list[Block]:
    """Histograms of all dimensions together, and of the most active ones."""
    draws = trained.posterior_sample(posterior, seed=seed)
    shown = by_activity(posterior)[:SHOWN_DIMENSIONS]
    together = Figure()
    axes = together.add_subplot(xlabel="latent", ylabel="density", title="All dimensions")
    handles = _histogram(axes, posterior.mean.ravel(), draws.ravel())
    legend_below(together, handles, ("means", "draws", "N(0, 1)"))
    rows = -(-len(shown) // 2)
    each = Figure(figsize=(WIDTH, 0.4 + 1.15 * rows))
    grid = np.atleast_1d(each.subplots(rows, min(2, len(shown)), sharex=True)).ravel()
    for axes, dimension in zip(grid, shown, strict=False):
        _histogram(axes, posterior.mean[:, dimension], draws[:, dimension])
        axes.set_title(f"dimension {dimension}", fontsize=8)
        axes.set_yticks([])
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    outside = np.mean(np.abs(draws) > RANGE)
    said = "Means of inactive dimensions are all near 0, a spike that may be cut off at the top."
    said += f" {outside:.1%} of the draws lie outside." if outside > 0.0005 else ""
    return [
        chart(together, alt="Histogram of all latents beside the density of N(0, 1)", caption=said),
        chart(each, alt=f"Histograms of the dimensions {', '.join(map(str, shown))} beside N(0, 1)"),
    ]


def _histogram(axes: Any, means: Float[np.ndarray, " n"], draws: Float[np.ndarray, " n"]) -> tuple[Any, Any, Any]:
    edges = np.linspace(-RANGE, RANGE, BINS + 1)
    x = np.linspace(-RANGE, RANGE, 181)
    # Densities over all latents, not only those within the range.
    mean_density, draw_density = (
        np.histogram(part, edges)[0] / len(part) / (edges[1] - edges[0]) for part in (means, draws)
    )
    filled = axes.stairs(mean_density, edges, fill=True, color=COLORS[5], alpha=0.6)
    outline = axes.stairs(draw_density, edges, color=COLORS[0], linewidth=1.5)
    (curve,) = axes.plot(x, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), color=COLORS[1], linewidth=1.2)
    # Means of inactive dimensions are all near 0: a spike that would flatten the rest.
    axes.set_ylim(0, 1.15 * max(draw_density.max(), 0.4, min(mean_density.max(), 1.2)))
    axes.set_xlim(-RANGE, RANGE)
    return filled, outline, curve


def project(points: Float[np.ndarray, "n z"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]:
    """Points on their first two principal components, and the share of the variance of each component."""
    centered = points.astype(np.float64) - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    left, values = (np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 2)]) for array in (left, values))
    total = np.sum(np.square(values))
    return left[:, :2] * values[:2], np.square(values[:2]) / (total or 1.0)


def maps(table: CodeTable, scores: Mapping[str, float]) -> list[Block]:
    """Maps of the posterior means on their first two principal components, colored by the best predicted attributes."""
    means = table.posterior.mean
    rows = np.linspace(0, len(means) - 1, min(SHOWN_POINTS, len(means))).round().astype(int)
    points, shares = project(means[rows])
    attributes = best_first(table.labels.attributes, scores)[:SHOWN_ATTRIBUTES]
    draw = functools.partial(_map, points, shares)
    if not attributes:
        return [draw(None, None), Note("The images have no labels.")]
    return [draw(attribute, table.labels.column(attribute.name)[rows]) for attribute in attributes]


def _map(
    points: Float[np.ndarray, "n 2"],
    shares: Float[np.ndarray, " 2"],
    attribute: Attribute | None,
    values: Float[np.ndarray, " n"] | None,
) -> Picture:
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.6))
    name = attribute.name if attribute else "all images"
    axes = figure.add_subplot(title=label(name))
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({shares[1]:.0%})")
    style: dict[str, Any] = {"s": 5, "linewidths": 0, "alpha": 0.75, "rasterized": True}
    if attribute is None or values is None:
        axes.scatter(*points.T, color=COLORS[0], **style)
        return chart(figure, alt=f"Map of the latents of {len(points):,} images")
    known = np.isfinite(values)
    axes.scatter(*points[~known].T, color=FAINT, **style)
    if attribute.kind == "continuous":
        x, y = points[known].T
        drawn = axes.scatter(x, y, c=values[known], cmap=SCALE, **style)
        if known.any():
            figure.colorbar(drawn, ax=axes, shrink=0.9)
    else:
        classes = attribute.categories or ("no", "yes")
        members = [points[values == number] for number in range(len(classes))]
        colors = [COLORS[number % len(COLORS)] for number in range(len(classes))]
        # The rare classes last, on top of the others.
        for group, color in sorted(zip(members, colors, strict=True), key=lambda drawn: -len(drawn[0])):
            axes.scatter(*group.T, color=color, **style)
        legend_below(figure, [axes.scatter([], [], s=25, color=color) for color in colors], classes)
    unknown = f"; {int(np.sum(~known)):,} without the label are gray" if not known.all() else ""
    return chart(figure, alt=f"Map of the latents of {len(points):,} images, colored by {attribute.name}{unknown}")


def priors(trained: TrainedModel, posterior: Encoded, *, images: str) -> Table:
    """The rate under each prior that is fitted already; `images` says in words of which images."""
    rates = {name: rate(trained, trained.prior(name), posterior) for name in trained.available_priors()}
    standard = rates[STANDARD]
    rows = [
        (name, f"{value:,.2f}", f"{value - standard:+,.2f}" if name != STANDARD else "", prior_class(name).description)
        for name, value in rates.items()
    ]
    header = ("Prior", "Rate, nats", "Against standard", "What it is")
    return Table(f"Rate of the codes of the {images}", header, rows)
