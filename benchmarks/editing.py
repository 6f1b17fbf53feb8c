"""Measures edits on drawn faces, where the truth is known: a regressor reads every attribute before and after.

python -m benchmarks.editing --workdir=/tmp/drawn64 --json=benchmarks/results/editing_drawn64.json

An edit by alpha should change its attribute by alpha standard deviations of that attribute and no other attribute.
The figure is the mean change over validation faces, each moved towards the other side of the mean: by one standard
deviation for a continuous attribute, all the way for a binary one.
"""

from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float

from benchmarks.attribute_regressor import Regressor, spread, standardize, train_regressor
from benchmarks.environment import environment
from benchmarks.report import markdown
from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import write_json
from facevae_jax.data.dataset import Drawn
from facevae_jax.data.drawn.synthetic import ATTRIBUTES
from facevae_jax.latents.directions import METHODS, Direction
from facevae_jax.trained.directions import direction_of
from facevae_jax.trained.edit_curves import METHOD, Curve, curve_of
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel

NAMES = [attribute.name for attribute in ATTRIBUTES]
MONOTONIC = (-1.0, -0.5, 0.0, 0.5, 1.0)  # shares of alpha: the attribute's mean must grow from each to the next
HEADINGS = (
    "attribute",
    "R² in reconstructions",
    "read off latents",
    "change, of what was meant",
    "monotonic",
    "largest change of another",
)


def measure(
    trained: TrainedModel,
    read: Regressor,
    direction: Direction | Curve,
    codes: Float[np.ndarray, "n z"],
    truth: np.ndarray,
) -> dict[str, Any]:
    """One attribute's row, for faces with these codes and true standardized attributes [n, a]."""

    def read_edited(alphas: np.ndarray) -> np.ndarray:
        edited = [direction.edit(code, [alpha])[0] for code, alpha in zip(codes, alphas, strict=True)]
        return read(trained.decode(np.stack(edited)))

    number = NAMES.index(direction.attribute)
    alpha = 1.0 if ATTRIBUTES[number].frequency is None else 1 / spread()[1][number]
    sign = np.where(truth[:, number] > 0, -1.0, 1.0)
    before = read(trained.decode(codes))
    change = ((read_edited(sign * alpha) - before) * sign[:, None] / alpha).mean(axis=0)  # 1: as intended
    others = {name: abs(value) for name, value in zip(NAMES, change.tolist(), strict=True) if name != NAMES[number]}
    worst = max(others, key=others.__getitem__)
    means = [float(read_edited(np.full(len(codes), share * alpha))[:, number].mean()) for share in MONOTONIC]
    return {
        "attribute": direction.attribute,
        "alpha": alpha,
        "change": float(change[number]),
        "monotonic": bool(np.all(np.diff(means) > 0)),
        "means": means,
        "largest_other": others[worst],
        "which": worst,
        "score": direction.score,
    }


def table(rows: list[dict[str, Any]], reconstructed: dict[str, float]) -> str:
    """A Markdown table of one method's rows, beside the R² of each attribute in reconstructions: what codes hold."""
    cells = [
        (
            row["attribute"],
            f"{reconstructed[row['attribute']]:.2f}",
            f"{row['score']:.2f}",
            f"{row['change']:.0%}",
            "yes" if row["monotonic"] else "no",
            f"{row['largest_other']:.0%} ({row['which']})",
        )
        for row in rows
    ]
    return "\n".join(markdown(HEADINGS, cells))


def measure_all(trained: TrainedModel, read: Regressor, *, faces: int) -> dict[str, Any]:
    """Every attribute by each method, with all others kept."""
    split = trained.dataset.evaluation_split
    codes, images = trained.codes.posterior(split).mean[:faces], trained.dataset.images(split)[:faces]
    truth = standardize(trained.dataset.labels(split).values[:faces])
    drawn, reconstructed = (
        dict(zip(NAMES, (1 - np.mean((read(x) - truth) ** 2, axis=0) / truth.var(axis=0)).tolist(), strict=True))
        for x in (images, trained.decode(codes))
    )
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in (*METHODS, METHOD)}
    for method, measured in rows.items():
        for name in NAMES:
            try:
                direction: Direction | Curve = (
                    curve_of(trained, name, keep=("all",))
                    if method == METHOD
                    else direction_of(trained, name, method=method, keep=("all",))
                )
            except UserError as error:  # the codes do not hold it
                print(error)
                continue
            measured.append(measure(trained, read, direction, codes, truth))
        print(f"{method}:\n\n{table(measured, reconstructed)}\n", flush=True)
    return {
        "faces": len(codes),
        "regressor_r2_on_drawn_faces": drawn,
        "regressor_r2_on_reconstructions": reconstructed,
        "rows": rows,
    }


def main(arguments: list[str]) -> None:
    """Trains the regressor, measures and writes the record."""
    del arguments
    values = flags.FLAGS
    startup.keep_compiled_programs()
    trained = load(values.workdir)
    if not isinstance(trained.dataset, Drawn):
        raise UserError(f"--workdir={values.workdir!r} must be a run on drawn faces.")
    record = measure_all(trained, train_regressor(resolution=trained.resolution), faces=values.faces)
    if values.json:
        config = trained.config.to_dict() | {"data": {"name": trained.dataset.name, "resolution": trained.resolution}}
        write_json(values.json, {"what": __doc__, "environment": environment(), "config": config, **record})


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of a run on drawn faces.", required=True)
    flags.DEFINE_integer("faces", 512, "of validation that are edited", lower_bound=8)
    flags.DEFINE_string("json", None, "file to write")
    startup.use_huge_pages()
    command_line.run(main)
