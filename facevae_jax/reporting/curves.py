"""Curves of training and evaluation, rate against distortion, and samples as training went."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

from facevae_jax.core.pictures import GAP
from facevae_jax.reporting.page import (
    COLORS,
    FAINT,
    Block,
    Note,
    Picture,
    chart,
    legend_below,
    logarithmic,
    sheet,
)
from facevae_jax.reporting.runs import Run, Series, number
from facevae_jax.training.pictures import COLUMNS, PICTURES

# Keys of the records: title and axis.
TERMS = {
    "loss": ("Loss", "loss"),
    "reconstruction": ("Reconstruction term", "reconstruction"),
    "mse": ("MSE", "MSE"),
    "kl": ("KL divergence", "KL, nats"),
}
STRIPS = 6  # steps whose samples are shown, at most
MAX_ANNOTATED = 8  # runs whose weight is written beside their point
STEEP = 20.0  # largest value to the median above which the axis is logarithmic
EARLY = 0.1  # of the steps: values until then are cut off where they would flatten the rest
FLATTENING = 0.5  # distance beyond the later values, to their range, from which they would
MARGIN = 0.06  # above and below, to the range


def loss_curves(runs: Sequence[Run]) -> list[Block]:
    """The loss and its parts. Runs with another likelihood, whose loss has another unit, show the other parts only."""
    likelihood = runs[0].config.objective.likelihood
    alike = [run for run in runs if run.config.objective.likelihood == likelihood]
    parts = {"loss": alike, "reconstruction": alike, "mse": runs, "kl": runs}
    blocks: list[Block] = [curve(shown, key) for key, shown in parts.items()]
    if any("rates" in record for record in runs[0].evaluations):
        blocks.append(group_curves(runs[0]))
    if others := ", ".join(run.name for run in runs if run not in alike):
        blocks.append(Note(f"Not among the losses, whose unit depends on the likelihood: {others}."))
    return blocks


def curve(runs: Sequence[Run], key: str) -> Picture:
    """One term over the steps, of all runs."""
    title, axis = TERMS[key]
    figure = Figure()
    axes = figure.add_subplot(title=title, xlabel="optimizer step", ylabel=axis)
    lines, drawn = [], []
    for run in runs:
        train, evaluation = run.series("train", key), run.series("evaluation", key)
        lines += axes.plot(*train, color=color_of(run), linewidth=0.8, alpha=0.6)
        lines += axes.plot(*evaluation, color=color_of(run), linewidth=2.0, marker="o", markersize=3)
        drawn += [train, evaluation]
    beyond = fit_axis(axes, Series(*map(np.concatenate, zip(*drawn, strict=True))))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    if len(runs) > 1:
        legend_below(figure, lines[1::2], [run.name for run in runs])
    else:
        legend_below(figure, lines, ["training steps", runs[0].evaluated_images])
    if key == "kl":
        for step in shown_pictures(runs[0]):
            axes.axvline(step, color=FAINT, linewidth=0.8, linestyle=":")
    last = runs[0].evaluations[-1].get(key) if runs[0].evaluations else None
    ends = f", ending at {last:,.5g}" if last is not None else ""
    return chart(figure, alt=f"{title} over optimizer steps{ends}{beyond}")


def fit_axis(axes: Any, points: Series) -> str:
    """Cuts the y axis to what later points need where the first ones would flatten them, and marks where they are.

    Returns:
      What is cut off, for readers who cannot see the chart.
    """
    finite = np.isfinite(points.values)
    steps, values = points.steps[finite], points.values[finite]
    later = values[steps > EARLY * steps.max(initial=0)]
    if len(later) and later.min() > 0 and later.max() > STEEP * np.median(later):
        logarithmic(axes)
        return ""
    if len(later) < 2 or not np.ptp(later):
        return ""
    span = np.ptp(later)
    up, down = (distance > FLATTENING * span for distance in (values.max() - later.max(), later.min() - values.min()))
    if not up and not down:
        return ""
    low, high = (later.min() if down else values.min()), (later.max() if up else values.max())
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
    axes.set_ylim(low, high)
    said = []
    for cut, word, marker, edge, at in (
        (up, "up", "^", high, values.argmax()),
        (down, "down", "v", low, values.argmin()),
    ):
        if cut:
            axes.plot(steps[at], edge, marker=marker, markersize=5, color=FAINT, clip_on=False)
            said.append(f"{word} to {values[at]:,.4g}")
    axes.set_title(", ".join(said), loc="right", fontsize=8, color=FAINT)
    return f"; early values, {', '.join(said)}, are beyond the axis"


def group_curves(run: Run) -> Picture:
    """The KL of each group of latents, from the top group down, or of each resolution where they are many."""
    sides = next((record["resolutions"] for record in run.evaluations if "resolutions" in record), None)
    steps, rates = run.series("evaluation", "rates_by_resolution" if sides else "rates")
    figure, what = Figure(), "resolution" if sides else "group"
    axes = figure.add_subplot(title=f"KL of each {what}", xlabel="optimizer step", ylabel="KL, nats")
    lines = axes.plot(steps, rates, marker="o", markersize=3)
    legend_below(figure, lines, sides or [f"group {group}" for group in range(len(lines))])
    return chart(figure, alt=f"KL of {len(lines)} {'resolutions' if sides else 'groups'} of latents over steps")


def strips(run: Run) -> list[Block]:
    """Samples from N(0, I) at some of the evaluations, from the same latents each time."""
    blocks: list[Block] = []
    for step, path in shown_pictures(run).items():
        faces = first_row(path, resolution=run.config.data.resolution)
        if faces is None:
            continue
        record = run.evaluation_at(step) or {}
        kl = f", KL {record['kl']:,.1f} nats" if record.get("kl") is not None else ""
        text = f"Step {step:,}{kl}"
        blocks.append(sheet(faces[None], alt=f"{len(faces)} faces sampled after step {step:,}", caption=text))
    if not blocks:
        return [Note(f"Left out: {run.workdir / PICTURES} has no pictures of samples from the standard prior.")]
    intro = (
        "Samples from N(0, I) during training, from the same latents each time, at the dotted lines of the KL curve. "
        "They become faces as the KL term pulls the posteriors towards the prior and the decoder learns."
    )
    return [Note(intro), *blocks]


def shown_pictures(run: Run) -> dict[int, pathlib.Path]:
    """The samples of training by their steps; `STRIPS` of them, evenly spaced from first to last, if there are more."""
    paths = sorted((run.workdir / PICTURES).glob("samples_standard_" + "[0-9]" * 8 + ".png"))
    chosen = np.linspace(0, len(paths) - 1, min(STRIPS, len(paths))).round().astype(int)
    return {int(paths[i].stem[-8:]): paths[i] for i in chosen}


def first_row(path: pathlib.Path, *, resolution: int) -> UInt8[np.ndarray, "n r r 3"] | None:
    """The first row of a grid that training wrote; None if it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # To the end of the last face's gap, which is outside of the picture.
            if image.width != COLUMNS * (resolution + GAP) - GAP:
                return None
            row = image.convert("RGB").crop((0, 0, COLUMNS * (resolution + GAP), resolution))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return np.asarray(row).reshape(resolution, COLUMNS, -1, 3)[:, :, :resolution].swapaxes(0, 1)


def rate_distortion(runs: Sequence[Run]) -> list[Block]:
    """A point for each run at its last evaluation, and the path of its earlier evaluations."""
    evaluated = [run for run in runs if run.evaluations]
    notes: list[Block] = [
        Note(f"{run.name} has not been evaluated yet and is left out.") for run in runs if not run.evaluations
    ]
    if not evaluated:
        return notes
    if len({run.config.data.resolution for run in evaluated}) > 1:
        notes.append(Note("The runs have different resolutions: fewer pixels need fewer nats for the same error."))
    figure = Figure()
    axes = figure.add_subplot(xlabel="rate: KL, nats", ylabel="distortion: MSE")
    lines, points = [], []
    for run in evaluated:
        last = run.evaluations[-1]
        rate, distortion = run.series("evaluation", "kl").values, run.series("evaluation", "mse").values
        axes.plot(rate, distortion, color=color_of(run), linewidth=0.8, marker=".", markersize=3, alpha=0.5)
        lines += axes.plot(rate[-1], distortion[-1], color=color_of(run), marker="o", markersize=7)
        points.append(f"{run.name} {number(last.get('kl'), ',.4g')} nats, MSE {number(last.get('mse'), ',.4g')}")
        if len(evaluated) <= MAX_ANNOTATED:
            at = (rate[-1], distortion[-1])
            axes.annotate(run.weight, at, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(0.18)
    axes.ticklabel_format(axis="y", style="plain")
    legend_below(figure, lines, [run.name for run in evaluated])
    return [chart(figure, alt=f"Distortion against rate: {'; '.join(points)}"), *notes]


def color_of(run: Run) -> str:
    """The same in every chart."""
    return COLORS[run.number % len(COLORS)]
