"""Writes the page about a run."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import facevae_jax
from facevae_jax.config import RunConfig
from facevae_jax.core.files import atomic_writer
from facevae_jax.core.settings import flatten
from facevae_jax.metrics import scores as metrics
from facevae_jax.metrics.protocol import differing
from facevae_jax.models import config_class
from facevae_jax.models.likelihoods import LIKELIHOODS
from facevae_jax.reporting import curves, faces, latents
from facevae_jax.reporting.page import Block, Note, Table, drawing, or_note, render
from facevae_jax.reporting.runs import NONE, Run, images_of, number, open_runs
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel
from facevae_jax.trained.ranking import WEAK, attribute_scores
from facevae_jax.training.evaluation import ACTIVE_VARIANCE
from facevae_jax.training.setup import make_model

PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint")
# Figures of an evaluation: key of the record, name, unit, format.
SCORES = (
    ("loss", "Loss, what was minimized", "", ",.2f"),
    ("mse", "MSE", "", ".6f"),
    ("kl", "KL divergence", "nats", ",.2f"),
    ("nll", "Negative log likelihood of the decoder", "nats", ",.2f"),
    ("negative_elbo", "Negative ELBO", "nats", ",.2f"),
    ("bits_per_dim", "Bits per dimension", "bits", ".4f"),
    ("variance", "Variance of the decoder's Gaussian", "", ",.6g"),
    ("equivalent_r_loss_factor", "Equivalent r_loss_factor of this variance", "", ",.1f"),
)
OF_A_GAUSSIAN = ("variance", "equivalent_r_loss_factor")


def write_report(workdir: pathlib.Path, output: pathlib.Path, *, compare: Sequence[pathlib.Path] = ()) -> str:
    """Writes the page about the run in `workdir`, and returns a line to print.

    Args:
      workdir: of the run.
      output: the file; it is replaced when the page is complete.
      compare: workdirs of other runs, which appear in the scores, the curves and the rate-distortion chart.

    Raises:
      UserError: no run, no checkpoint, or one that cannot be read.
    """
    runs = open_runs([workdir, *compare])
    run = runs[0]
    trained = load(workdir)
    with drawing():
        sections = make_sections(trained, runs)
    page = render(
        title=run.name,
        summary=summary(trained, run),
        sections=sections,
        images=run.evaluated_images,
        weak=WEAK,
        active_variance=ACTIVE_VARIANCE,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=facevae_jax.__version__,
    )
    with atomic_writer(output) as file:
        file.write(page)
    return f"{output}: {len(sections)} sections, {len(page) / 2**20:.1f} MiB, step {trained.step:,}"


def make_sections(trained: TrainedModel, runs: Sequence[Run]) -> dict[str, Sequence[Block]]:
    """The page's blocks by section: what the model can do, then figures; a section whose data are missing says so."""
    run, seed = runs[0], runs[0].config.train.seed
    ranked = functools.cache(lambda: attribute_scores(trained))
    table = functools.cache(lambda: trained.codes.table(trained.dataset.evaluation_split))
    given = functools.cache(lambda: faces.given_faces(trained, trained.dataset.evaluation_split))
    built: dict[str, Callable[[], Sequence[Block]]] = {
        "attributes": lambda: faces.attributes(ranked()),
        "edits": lambda: faces.edits(trained, given(), ranked()),
        "reconstructions": lambda: [faces.reconstructions(trained, given())],
        "interpolation": lambda: faces.interpolation(trained, given, seed=seed),
        "samples": lambda: faces.samples(trained, seed=seed),
        **({"groups": lambda: faces.groups(trained, given(), seed=seed)} if trained.detail_size else {}),
        "morph": lambda: faces.morph(trained, given, seed=seed),
        "traversal": lambda: faces.traversal(trained),
        "scores": lambda: scores(trained, runs),
        "rate-distortion": lambda: curves.rate_distortion(runs),
        "training": lambda: [*curves.loss_curves(runs), *curves.strips(run)],
        "dimensions": lambda: latents.dimensions(table().posterior),
        "distribution": lambda: latents.histograms(trained, table().posterior, seed=seed),
        "map": lambda: latents.maps(table(), ranked()),
        "priors": lambda: [latents.priors(trained, table().posterior, images=run.evaluated_images)],
        "provenance": lambda: provenance(trained, run),
        "settings": lambda: settings(run.config),
    }
    sections = {anchor: or_note(build) for anchor, build in built.items()}
    return dict(sorted(sections.items(), key=lambda section: is_left_out(section[1])))


def is_left_out(blocks: Sequence[Block]) -> bool:
    """Whether a section only says why it is empty; such sections come last."""
    return all(isinstance(block, Note) for block in blocks)


def summary(trained: TrainedModel, run: Run) -> dict[str, str]:
    """The figures at the top of the page."""
    record = run.evaluation_at(trained.step) or {}
    return {
        "Data": f"{run.config.data.name}, {trained.resolution}x{trained.resolution}",
        "Step": f"{trained.step:,}",
        "Loss": number(record.get("loss"), ",.2f"),
        "MSE": number(record.get("mse"), ".6f"),
        "KL": f"{number(record.get('kl'), ',.1f')} nats",
        "Code": shape_of(trained.code_shape),
    }


def scores(trained: TrainedModel, runs: Sequence[Run]) -> list[Block]:
    """The evaluations of this checkpoint, of the last step, and of the other runs."""
    run = runs[0]
    if not run.evaluations:
        blocks: list[Block] = [Note("Left out: the run has not been evaluated yet.")]
    else:
        last = run.evaluations[-1]
        shown = run.evaluation_at(trained.step)
        columns = [(f"This checkpoint, step {trained.step:,}", shown)] if shown else []
        if shown is not last:
            columns.append((f"Last evaluation, step {last['step']:,}", last))
        discrete = LIKELIHOODS[run.config.objective.likelihood].discrete
        rows = [
            [name + (f", {unit}" if unit else ""), *(number(record.get(key), form) for _, record in columns)]
            for key, name, unit, form in SCORES
            if any(key in record for _, record in columns) and not (key in OF_A_GAUSSIAN and discrete)
        ]
        caption = f"Scores of the {run.evaluated_images}"
        blocks = [Table(caption, ["Figure", *(name for name, _ in columns)], rows, figures=True)]
    blocks += evaluated(trained)
    return [*blocks, compared(runs), *lined_up(runs)] if len(runs) > 1 else blocks


def evaluated(trained: TrainedModel) -> list[Block]:
    """The records that `facevae_jax.evaluate` wrote for this checkpoint, one for each split."""
    blocks: list[Block] = []
    for path in sorted(trained.folder.glob("evaluation_*.json")):
        try:
            record = json.loads(path.read_text())
            if record["step"] != trained.step:
                continue
            # The page has one MSE, that of the run's evaluations; this one is of the posterior means.
            rows = [list(row) for row in metrics.figures(record) if row[0] != "MSE"]
            caption = (
                f"Evaluation of {record['images']:,} {images_of(record['split'])}, reconstructed from posterior means"
            )
        except (OSError, ValueError, KeyError, TypeError):  # from another version, or damaged
            blocks.append(Note(f"Left out: {path.name} cannot be read: evaluate the run again."))
            continue
        if record.get("recalibrated"):
            caption += ", with recalibrated batch normalization"
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
                "Code": shape_of(make_model(run.config)[0].code_shape),
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


def lined_up(runs: Sequence[Run]) -> list[Block]:
    """The distances that `facevae_jax.evaluate` wrote for the runs, beside those of the first where protocols agree."""
    found = {run.name: _distances(run.workdir) for run in runs}
    (first, own), *others = found.items()
    blocks: list[Block] = []
    for key, record in own.items():
        columns = {first: record}
        for name, records in others:
            if key not in records:
                continue
            if unlike := differing([record["protocol"], records[key]["protocol"]]):
                said = "; ".join(f"{part} is {a!r} and {b!r}" for part, (a, b) in unlike.items())
                blocks.append(Note(f"{name} is not lined up with {first} by {key}: {said}."))
            else:
                columns[name] = records[key]
        if len(columns) > 1:
            scored = [score for score in record if score.startswith(("sample_", "reconstruction_"))]
            rows = [
                [score.replace("_", " "), *(number(of.get(score), ".5g") for of in columns.values())]
                for score in scored
            ]
            blocks.append(Table(f"Distances by {key}, of one protocol", ["Score", *columns], rows, figures=True))
    return blocks


def _distances(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Records with a protocol by kind and split, such as `features, validation split`."""
    found = {}
    for path in sorted(workdir.glob("evaluation_*.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            for key, part in json.loads(path.read_text()).items():
                if isinstance(part, dict) and "protocol" in part and key != "diagnosis":
                    found[f"{key}, {part['protocol']['split']} split"] = part
    return found


def provenance(trained: TrainedModel, run: Run) -> list[Block]:
    """The data, the training and the machine."""
    data = run.config.data
    speed = run.series("train", "images_per_second").values
    devices, numbers = jax.devices(), sum(leaf.size for leaf in jax.tree.leaves(trained.variables))
    rows = [
        ("Dataset", f"{data.name}, {data.resolution}x{data.resolution} pixels"),
        *trained.dataset.describe(),
        ("Trained", f"{trained.step:,} steps of {run.config.train.batch_size} images"),
        ("Training speed", f"{np.nanmedian(speed):,.0f} images/s, the median over log lines" if len(speed) else NONE),
        ("Parameters", f"{numbers:,}, counting batch statistics"),
        ("Run's folder", str(run.workdir)),
        ("Page made on", f"{len(devices)} x {devices[0].device_kind}, Python {platform.python_version()}"),
        ("Versions", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)),
    ]
    return [Table("Where the run comes from", ("What", "Value"), rows)]


def shape_of(shape: Sequence[int]) -> str:
    """The shape of a code in words."""
    return " x ".join(map(str, shape)) + (" numbers" if len(shape) == 1 else "")


def settings(config: RunConfig) -> list[Block]:
    """Every setting, a table for each part."""
    model = config_class(config.model.kind)(kind=config.model.kind)  # need not suit the data's default resolution
    defaults = flatten(RunConfig().to_dict() | {"model": dataclasses.asdict(model)})
    tables: list[Block] = []
    for part, values in config.to_dict().items():
        rows = [
            (key, f"{shown(value)}{' *' if defaults.get(f'{part}.{key}') != value else ''}")
            for key, value in flatten(values).items()
        ]
        tables.append(Table(f"config.{part}", ("Setting", "Value"), rows, row="tables"))
    return tables


def shown(value: Any) -> str:
    """A setting as it is typed; a dash for an empty one."""
    return NONE if value in ("", []) else str(value)
