"""From a run's folder to its page."""

import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import facevae_jax
from facevae_jax.config import RunConfig, flatten
from facevae_jax.data import dataset
from facevae_jax.data.cache import local_dataset
from facevae_jax.data.pixels import SYNTHETIC
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer
from facevae_jax.generation import latent_tables
from facevae_jax.generation.loading import load
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.metrics import scores as metrics
from facevae_jax.reporting import curves, faces, latents
from facevae_jax.reporting.page import Block, Note, Section, Table, render, section
from facevae_jax.reporting.runs import Run, open_runs

PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint")
# Figures of an evaluation: key of the record, name, unit, format.
SCORES = (
    ("loss", "Loss, what was minimised", "", ",.2f"),
    ("mse", "Mean squared error, pixels from 0 to 1", "", ".6f"),
    ("kl", "KL divergence", "nats", ",.2f"),
    ("nll", "Negative log likelihood of the decoder", "nats", ",.2f"),
    ("negative_elbo", "Negative ELBO", "nats", ",.2f"),
    ("bits_per_dim", "Bits per dimension", "bits", ".4f"),
    ("variance", "Variance of the decoder's Gaussian", "", ",.6g"),
    ("equivalent_r_loss_factor", "r_loss_factor that this variance is equal to", "", ",.1f"),
)
OF_A_GAUSSIAN = ("variance", "equivalent_r_loss_factor")
NONE = "–"  # noqa: RUF001 - the dash that tables use


def write_report(workdir: pathlib.Path, output: pathlib.Path, *, compare: Sequence[pathlib.Path] = ()) -> str:
    """Writes the page about the run in `workdir` and returns a line that says so.

    Args:
      workdir: of the run.
      output: the file, replaced when the page is whole.
      compare: workdirs of other runs, for the curves and the trade-off of rate and distortion.

    Raises:
      UserError: no run, no checkpoint, or one that cannot be read.
    """
    runs = open_runs([workdir, *compare])
    run = runs[0]
    trained = load(workdir)
    sections = make_sections(trained, runs)
    page = render(
        title=run.name,
        summary=summary(trained, run),
        sections=sections,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=facevae_jax.__version__,
    )
    with atomic_writer(output) as file:
        file.write(page)
    return f"{output}: {len(sections)} sections, {len(page) / 2**20:.1f} MiB, step {trained.step:,}"


def make_sections(trained: TrainedVAE, runs: Sequence[Run]) -> list[Section]:
    """All of the page, in the order in which a reader wants it."""
    run, seed = runs[0], runs[0].config.train.seed

    @functools.cache
    def table() -> latent_tables.LatentTable:
        return latent_tables.encode_split(trained, latent_tables.evaluation_split(trained))

    training = curves.sections(runs)
    pictures = faces.sections(trained, split=split_name(trained, run), seed=seed)
    space = latents.sections(trained, table, seed=seed)
    found = {part.anchor: part for part in [*training, *pictures, *space]}
    order = (
        *("reconstructions", "samples", "training", "rate-distortion", "dimensions", "distribution", "map", "priors"),
        *("interpolation", "morph", "traversal", "edits"),
    )
    return [
        section("scores", "Scores", SCORES_EXPLAINED, lambda: scores(trained, runs)),
        *(found[anchor] for anchor in order),
        section("provenance", "Provenance", PROVENANCE_EXPLAINED, lambda: provenance(trained, run)),
        section("settings", "Settings", SETTINGS_EXPLAINED, lambda: settings(run.config)),
    ]


SCORES_EXPLAINED = (
    "Figures of the whole evaluation split. Sums run over pixels and latents, means over images; the negative ELBO is "
    "the negative log likelihood plus the KL divergence."
)
PROVENANCE_EXPLAINED = "What the model was trained on, and what this page was made with."
SETTINGS_EXPLAINED = "Every setting of the run; those that differ from the default are marked with a star."


def split_name(trained: TrainedVAE, run: Run) -> str:
    """The split that faces are taken from: that of the evaluations."""
    try:
        return latent_tables.evaluation_split(trained)
    except UserError:
        return run.evaluation_split


def summary(trained: TrainedVAE, run: Run) -> dict[str, str]:
    """What a reader wants to know first."""
    record = run.evaluation_at(trained.step) or {}
    return {
        "Data": f"{run.config.data.name}, {trained.resolution}x{trained.resolution}",
        "Step": f"{trained.step:,}",
        "Loss": number(record.get("loss"), ",.2f"),
        "MSE": number(record.get("mse"), ".5f"),
        "KL": f"{number(record.get('kl'), ',.1f')} nats",
        "Latent": f"{trained.latent_dim} numbers",
    }


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none or it was not finite."""
    return NONE if value is None else format(value, form)


def scores(trained: TrainedVAE, runs: Sequence[Run]) -> list[Block]:
    """The shown checkpoint's evaluation, the last one, and those of the other runs."""
    run = runs[0]
    if not run.evaluations:
        blocks: list[Block] = [Note("Left out: the run has not been evaluated yet.")]
    else:
        last = run.evaluations[-1]
        shown = run.evaluation_at(trained.step)
        columns = [(f"This checkpoint, step {trained.step:,}", shown)] if shown else []
        if shown is not last:
            columns.append((f"Last evaluation, step {last['step']:,}", last))
        discrete = run.config.objective.is_discrete
        rows = [
            [name + (f", {unit}" if unit else ""), *(number(record.get(key), form) for _, record in columns)]
            for key, name, unit, form in SCORES
            if any(key in record for _, record in columns) and not (key in OF_A_GAUSSIAN and discrete)
        ]
        split = run.evaluation_split
        blocks = [Table(f"Scores of the {split} split", ["Figure", *(name for name, _ in columns)], rows, figures=True)]
    blocks += evaluated(trained)
    return [*blocks, compared(runs)] if len(runs) > 1 else blocks


def evaluated(trained: TrainedVAE) -> list[Block]:
    """What `facevae_jax.evaluate` found of this checkpoint, of each split that it was asked for."""
    blocks: list[Block] = []
    for path in sorted(trained.folder.glob("evaluation_*.json")):
        try:
            record = json.loads(path.read_text())
            if record["step"] != trained.step:
                continue
            rows = [list(row) for row in metrics.figures(record)]
            caption = f"Evaluation of the {record['split']} split, {record['images']:,} images"
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or not whole
            blocks.append(Note(f"Left out: {path.name} cannot be read: evaluate the run again."))
            continue
        if record.get("recalibrated"):
            caption += ", with batch normalisation's statistics computed anew"
        blocks.append(Table(caption, ["Score", "Value", "Of what"], rows))
    return blocks


def compared(runs: Sequence[Run]) -> Table:
    """The runs side by side, each at its last evaluation."""
    columns = []
    for run in runs:
        record = run.evaluations[-1] if run.evaluations else {"step": 0}
        data, side = run.config.data.name, run.config.data.resolution
        columns.append(
            {
                "Data": f"{data}, {side}x{side}",
                "Latent": f"{run.config.model.latent_dim} numbers",
                "Weight": run.weight,
                "Step": f"{record['step']:,}",
                "MSE": number(record.get("mse"), ".6f"),
                "KL, nats": number(record.get("kl"), ",.2f"),
                "Loss": number(record.get("loss"), ",.2f"),
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    caption = "The runs at their last evaluations; losses of different weights do not compare"
    return Table(caption, ["Run", *(run.name for run in runs)], rows, figures=True)


def provenance(trained: TrainedVAE, run: Run) -> list[Block]:
    """The data, the training and the machine."""
    data = run.config.data
    speed = run.series("train", "images_per_second").values
    devices = jax.devices()
    rows = [
        ("Dataset", f"{data.name}, {data.resolution}x{data.resolution} pixels"),
        *about_data(run.config),
        ("Trained", f"{trained.step:,} steps of {run.config.train.batch_size} images"),
        ("Training speed", f"{np.nanmedian(speed):,.0f} images/s, the median over log lines" if len(speed) else NONE),
        ("Parameters", f"{parameters(trained.variables):,}, counting batch statistics"),
        ("Run's folder", str(run.workdir)),
        ("Page made on", f"{len(devices)} x {devices[0].device_kind}, Python {platform.python_version()}"),
        ("Versions", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)),
    ]
    return [Table("Where the run comes from", ("What", "Value"), rows)]


def about_data(config: RunConfig) -> list[tuple[str, str]]:
    """How many images, and what the preparation noted about them."""
    data = config.data
    if data.name == SYNTHETIC:
        train, validation = data.synthetic_train_images, data.synthetic_validation_images
        return [("Images", f"{train:,} train, {validation:,} validation"), ("Source", "faces that the project draws")]
    try:
        directory = local_dataset(data)
        sizes, notes = dataset.split_sizes(directory), dataset.read_metadata(directory)
    except UserError as error:
        return [("Images", f"not on this machine: {error}")]
    rows = [("Images", ", ".join(f"{count:,} {split}" for split, count in sizes.items()))]
    names = {key: key.capitalize() for key in notes if key != "resolution"} | {"versions": "Prepared with"}
    return [*rows, *((name, described(notes[key])) for key, name in names.items() if key in notes)]


def described(value: Any) -> str:
    """A value of a dataset's metadata in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {described(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(str(part["name"]) if isinstance(part, Mapping) else str(part) for part in value) or "none"
    return str(value)


def parameters(variables: Any) -> int:
    """Numbers in the model."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def settings(config: RunConfig) -> list[Block]:
    """Every setting, a table for each part."""
    defaults = flatten(RunConfig().to_dict())
    tables: list[Block] = []
    for part, values in config.to_dict().items():
        rows = [
            (key, f"{shown(value)}{' *' if defaults.get(f'{part}.{key}') != value else ''}")
            for key, value in flatten(values).items()
        ]
        tables.append(Table(f"config.{part}", ("Setting", "Value"), rows, beside=True))
    return tables


def shown(value: Any) -> str:
    """A setting as it is typed, an empty one as what it means."""
    return NONE if value in ("", []) else str(value)
