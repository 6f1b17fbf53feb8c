"""The latent space in figures: what each dimension carries, how latents are distributed, and what priors cost."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from facevae_jax.data.layouts import Attribute
from facevae_jax.generation import fitting, latent_tables
from facevae_jax.generation.latent_tables import LatentTable
from facevae_jax.generation.sheets import shown_attributes
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.priors import PriorName
from facevae_jax.metrics.latents import active_units, kl_by_dimension
from facevae_jax.models.inference import Encoded
from facevae_jax.reporting.charts import COLOURS, HEIGHT, WIDTH, drawing, label, legend_below, logarithmic, picture
from facevae_jax.reporting.page import Block, Note, Picture, Section, Table, section
from facevae_jax.training.step import ACTIVE_VARIANCE

SHOWN_DIMENSIONS = 6  # that have a histogram of their own
SHOWN_POINTS = 4_000  # of the map, at most
SHOWN_ATTRIBUTES = 3  # that colour a map
RANGE = 4.5  # of histograms, in standard deviations of the prior
BINS = 45
PRIORS: dict[PriorName, str] = {
    "standard": "N(0, I), which training draws the posteriors towards",
    "gaussian": "mean and covariance of the posteriors of the evaluation split",
    "mixture": "a mixture of Gaussians, fitted to the posteriors of the training split",
    "second_stage": "a second VAE on the latents; its rate is an upper bound",
}


def sections(trained: TrainedVAE, table: Callable[[], LatentTable], *, seed: int) -> list[Section]:
    """Dimensions, distribution, map and priors.

    Args:
      trained: the model.
      table: gives the latents of the evaluation split, or raises a UserError.
      seed: of draws from the posteriors.
    """
    return [
        section(
            "dimensions",
            "What each dimension carries",
            "The KL divergence of each latent dimension, the largest first, and the variance of the posteriors' means "
            f"over the images. A dimension is active where that variance is over {ACTIVE_VARIANCE} (Burda et al. "
            "2016); the others carry nothing, and the decoder has learnt to ignore them.",
            lambda: dimensions(table().posterior),
        ),
        section(
            "distribution",
            "Distribution of the latents",
            "Where latents lie, beside the prior N(0, 1): means of the posteriors (filled), and one draw from each "
            "(outlined), which is what the decoder learnt from. The nearer the outline is to the curve, the more "
            "samples from the prior look like faces.",
            lambda: histograms(trained, table().posterior, seed=seed),
        ),
        section(
            "map",
            "Map of the latents",
            "Each image's posterior mean, on the two axes along which the means differ most (principal components), "
            "coloured by a label: where colours part, the latents know about it.",
            lambda: maps(table()),
        ),
        section(
            "priors",
            "Priors",
            "What it costs to tell a latent under each prior, in nats a face. Lower is better: such a prior knows more "
            "about where latents lie, so that its samples are nearer to faces. For N(0, I) it is the KL of the loss, "
            "but for the noise of the draws.",
            lambda: [priors(trained)],
        ),
    ]


def by_activity(posterior: Encoded) -> list[int]:
    """Latent dimensions, those whose posterior means vary most first."""
    return np.argsort(-posterior.mean.var(axis=0), kind="stable").tolist()


def dimensions(posterior: Encoded) -> list[Block]:
    """Sorted KL and variance of the means, and how many dimensions are active."""
    kl, variance = kl_by_dimension(posterior), posterior.mean.var(axis=0)
    size, active = len(kl), active_units(posterior)
    text = (
        f"{active} of {size} dimensions are active; together all carry {kl.sum():,.2f} nats, the first "
        f"{int(np.searchsorted(np.cumsum(np.sort(kl)[::-1]), 0.9 * kl.sum())) + 1} of them nine tenths of it."
    )
    with drawing():
        first, second = Figure(), Figure()
        axes = first.add_subplot(title="KL by dimension", xlabel="dimension, by rank", ylabel="KL, nats")
        axes.stairs(np.sort(kl)[::-1], np.arange(size + 1) + 0.5, fill=True, color=COLOURS[0])
        axes.set_ylim(bottom=0)
        _whole_ticks(axes)
        ranked = np.maximum(np.sort(variance)[::-1], 1e-8)  # 0 has no place on a logarithmic axis
        axes = second.add_subplot(title="Active units", xlabel="dimension, by rank", ylabel="variance of the means")
        logarithmic(axes)
        axes.stairs(ranked, np.arange(size + 1) + 0.5, baseline=None, color=COLOURS[0])
        axes.axhline(ACTIVE_VARIANCE, color=COLOURS[1], linestyle="--")
        above: Any = {"xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(f"active above {ACTIVE_VARIANCE}", (0.5, ACTIVE_VARIANCE), color=COLOURS[1], fontsize=8, **above)
        _whole_ticks(axes)
        return [
            Note(text),
            picture(first, alt=f"KL of {size} dimensions, from {kl.max():.3g} down to {kl.min():.3g} nats"),
            picture(second, alt=f"Variance of the posterior means of {size} dimensions: {active} are active"),
        ]


def _whole_ticks(axes: Any) -> None:
    axes.locator_params(axis="x", integer=True, nbins=6)


def histograms(trained: TrainedVAE, posterior: Encoded, *, seed: int) -> list[Block]:
    """Of all dimensions together, and of the most active ones."""
    draws = trained.posterior_sample(posterior, seed=seed)
    shown = by_activity(posterior)[:SHOWN_DIMENSIONS]
    with drawing():
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
        said = "Means of dimensions that carry nothing stand in the middle, beyond the top where there are many."
        said += f" {outside:.1%} of the draws lie outside." if outside > 0.0005 else ""
        return [
            picture(together, alt="Histogram of all latents beside the density of N(0, 1)", caption=said),
            picture(each, alt=f"Histograms of the dimensions {', '.join(map(str, shown))} beside N(0, 1)"),
        ]


def _histogram(axes: Any, means: Float[np.ndarray, " n"], draws: Float[np.ndarray, " n"]) -> tuple[Any, Any, Any]:
    edges = np.linspace(-RANGE, RANGE, BINS + 1)
    x = np.linspace(-RANGE, RANGE, 181)
    # Shares of all latents, not of those within the range, or what lies outside would go unseen.
    mean_density, draw_density = (
        np.histogram(part, edges)[0] / len(part) / (edges[1] - edges[0]) for part in (means, draws)
    )
    filled = axes.stairs(mean_density, edges, fill=True, color=COLOURS[5], alpha=0.6)
    outline = axes.stairs(draw_density, edges, color=COLOURS[0], linewidth=1.5)
    (curve,) = axes.plot(x, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), color=COLOURS[1], linewidth=1.2)
    # Means of dimensions that carry nothing are all at 0: a spike that would flatten the rest.
    axes.set_ylim(0, 1.15 * max(draw_density.max(), 0.4, min(mean_density.max(), 1.2)))
    axes.set_xlim(-RANGE, RANGE)
    return filled, outline, curve


def project(points: Float[np.ndarray, "n z"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]:
    """Points on their first two principal components, and the share of the variance that each of them has."""
    centred = points.astype(np.float64) - points.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    left, values = (np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 2)]) for array in (left, values))
    total = np.sum(np.square(values))
    return left[:, :2] * values[:2], np.square(values[:2]) / (total or 1.0)


def maps(table: LatentTable) -> list[Block]:
    """The two principal components of the means, once for each of a few attributes."""
    rows = np.linspace(0, len(table.mean) - 1, min(SHOWN_POINTS, len(table.mean))).round().astype(int)
    points, shares = project(table.mean[rows])
    attributes = shown_attributes(table.labels.attributes, SHOWN_ATTRIBUTES)
    draw = functools.partial(_map, points, shares)
    if not attributes:
        return [draw(None, None), Note("The images have no labels to colour the map by.")]
    return [draw(attribute, table.labels.column(attribute.name)[rows]) for attribute in attributes]


def _map(
    points: Float[np.ndarray, "n 2"],
    shares: Float[np.ndarray, " 2"],
    attribute: Attribute | None,
    values: Float[np.ndarray, " n"] | None,
) -> Picture:
    with drawing():
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.6))
        name = attribute.name if attribute else "all images"
        axes = figure.add_subplot(title=label(name))
        axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
        axes.set_ylabel(f"second ({shares[1]:.0%})")
        style: dict[str, Any] = {"s": 5, "linewidths": 0, "alpha": 0.75, "rasterized": True}
        if attribute is None or values is None:
            axes.scatter(*points.T, color=COLOURS[0], **style)
            return picture(figure, alt=f"Map of the latents of {len(points):,} images")
        known = np.isfinite(values)
        x, y = points[known].T
        axes.scatter(*points[~known].T, color="#cccccc", **style)
        if attribute.kind == "continuous":
            drawn = axes.scatter(x, y, c=values[known], cmap="viridis", **style)
            if known.any():
                figure.colorbar(drawn, ax=axes, shrink=0.9)
        else:
            classes = attribute.categories or ("no", "yes")
            # The rare ones last, or the others would hide them.
            number = values[known].astype(int)
            order = np.argsort(-np.bincount(number, minlength=len(classes))[number], kind="stable")
            x, y, number = x[order], y[order], number[order]
            colours = ListedColormap([COLOURS[i % len(COLOURS)] for i in range(len(classes))])
            drawn = axes.scatter(x, y, c=number, cmap=colours, vmin=0, vmax=len(classes) - 1, **style)
            handles = [axes.scatter([], [], s=25, color=colours(i)) for i in range(len(classes))]
            legend_below(figure, handles, [label(c) for c in classes])
        unknown = f"; {int(np.sum(~known)):,} without the label are grey" if not known.all() else ""
        alt = f"Map of the latents of {len(points):,} images, coloured by {attribute.name}{unknown}"
        return picture(figure, alt=alt)


def priors(trained: TrainedVAE) -> Table:
    """The rate of each prior that is there: N(0, I), the fitted Gaussian, and what has been fitted before."""
    posterior = latent_tables.encode_split(trained, latent_tables.evaluation_split(trained)).posterior
    standard = fitting.rate(trained, "standard", posterior)
    rows = [("standard", f"{standard:,.2f}", "", PRIORS["standard"])]
    for name in available_priors(trained):
        rate = fitting.rate(trained, name, posterior)
        rows.append((name, f"{rate:,.2f}", f"{rate - standard:+,.2f}", PRIORS[name]))
    header = ("Prior", "Rate, nats", "Against standard", "What it is")
    return Table("Rate of the evaluation split's latents under each prior", header, rows, figures=True)


def available_priors(trained: TrainedVAE) -> list[PriorName]:
    """Fitted priors that need no fitting now."""
    kept: tuple[PriorName, ...] = ("mixture", "second_stage")
    found = [name for name in kept if fitting.kept_at(trained, name).is_file()]
    return ["gaussian", *found] if float(trained.moments.images) else found
