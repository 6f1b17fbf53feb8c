"""Does an edit do what it says? On drawn faces the truth is known: a regressor reads every attribute before and after.

python -m benchmarks.editing --workdir=/tmp/drawn64 --json=benchmarks/results/editing_drawn64.json

An edit by alpha is meant to change its attribute by alpha standard deviations of that attribute, and all others not at
all. Measured is the mean change over faces of validation that have room for it: for a continuous attribute those on the
other side of the mean, moved by one standard deviation; for a binary one those without it (or with it), moved all the
way.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float

from benchmarks.attribute_regressor import Regressor, spread, standardised, train_regressor
from benchmarks.environment import environment
from facevae_jax import command_line, startup
from facevae_jax.data.pixels import SYNTHETIC, SYNTHETIC_VALIDATION_START
from facevae_jax.data.synthetic import ATTRIBUTES
from facevae_jax.errors import UserError
from facevae_jax.files import write_json
from facevae_jax.generation import latent_tables
from facevae_jax.generation.curves import METHOD, curve_of
from facevae_jax.generation.directions import direction_of
from facevae_jax.generation.loading import load
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.curves import Curve
from facevae_jax.latents.directions import METHODS, Direction

NAMES = [attribute.name for attribute in ATTRIBUTES]
MONOTONIC = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the way: means of the attribute have to grow from each to the next


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_string("workdir", None, "Of a run on drawn faces.")
    flags.DEFINE_integer("faces", 512, "of validation that are edited", lower_bound=8)
    flags.DEFINE_string("json", None, "file to write")


def measure(
    trained: TrainedVAE,
    read: Regressor,
    direction: Direction | Curve,
    latents: Float[np.ndarray, "n z"],
    truth: np.ndarray,
) -> dict[str, Any]:
    """One attribute's row.

    Args:
      trained: the model.
      read: gives the standardised attributes of faces.
      direction: of the attribute.
      latents: of faces.
      truth: their standardised attributes.
    """
    number = NAMES.index(direction.attribute)
    binary = ATTRIBUTES[number].frequency is not None
    alpha = 1 / spread()[1][number] if binary else 1.0
    room = np.where(truth[:, number] > 0, -1.0, 1.0)  # towards which side
    ways = [direction.edit(latent, [room[row] * alpha])[0] for row, latent in enumerate(latents)]
    before = read(trained.decode(latents))
    change = (read(trained.decode(np.stack(ways))) - before) * room[:, None] / alpha  # 1: as meant
    others = np.delete(change.mean(axis=0), number)
    names = [name for name in NAMES if name != direction.attribute]
    worst = int(np.abs(others).argmax())
    means = []
    for share in MONOTONIC:
        moved = np.stack([direction.edit(latent, [share * alpha])[0] for latent in latents])
        means.append(float(read(trained.decode(moved))[:, number].mean()))
    return {
        "attribute": direction.attribute,
        "alpha": alpha,
        "change": float(change[:, number].mean()),
        "monotonic": bool(np.all(np.diff(means) > 0)),
        "means": means,
        "largest_other": float(np.abs(others[worst])),
        "which": names[worst],
        "score": direction.score,
    }


def table(rows: list[dict[str, Any]], reconstructed: dict[str, float]) -> str:
    """Markdown.

    Args:
      rows: of one method.
      reconstructed: R² of each attribute as the regressor reads it off reconstructions: what the latents hold at all.
    """
    lines = [
        "| attribute | R² in reconstructions | read off latents | change, of what was meant | monotonic "
        "| largest change of another |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        yes = "yes" if row["monotonic"] else "no"
        lines.append(
            f"| {row['attribute']} | {reconstructed[row['attribute']]:.2f} | {row['score']:.2f} | {row['change']:.0%} "
            f"| {yes} | "
            f"{row['largest_other']:.0%} ({row['which']}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Measures all attributes, each keeping all others, by each method."""
    del arguments
    values = flags.FLAGS
    if not values.workdir:
        raise UserError("--workdir is missing: give a run on drawn faces.")
    startup.keep_compiled_programs()
    trained = load(pathlib.Path(values.workdir))
    if trained.config.data.name != SYNTHETIC:
        raise UserError(f"--workdir={values.workdir!r} is no run on drawn faces.")
    read = train_regressor(resolution=trained.resolution)
    latents = latent_tables.encode_split(trained, "validation").mean[: values.faces]
    truth = standardised(SYNTHETIC_VALIDATION_START + np.arange(len(latents)))
    images = latent_tables.read_rows(trained, "validation", range(len(latents))).images
    drawn, reconstructed = (
        dict(zip(NAMES, (1 - np.mean((read(x) - truth) ** 2, axis=0) / truth.var(axis=0)).tolist(), strict=True))
        for x in (images, trained.decode(latents))
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in (*METHODS, METHOD):
        rows[method] = []
        for name in NAMES:
            try:
                if method == METHOD:
                    moves: Direction | Curve = curve_of(trained, name, keep=("all",))
                else:
                    moves = direction_of(trained, name, method=method, keep=("all",))
            except UserError as error:  # it is not in the latents
                print(error)
                continue
            rows[method].append(measure(trained, read, moves, latents, truth))
        print(f"{method}:\n\n{table(rows[method], reconstructed)}\n", flush=True)
    if values.json:
        record = {
            "what": __doc__,
            "environment": environment(),
            "config": trained.config.to_dict() | {"data": {"name": SYNTHETIC, "resolution": trained.resolution}},
            "faces": len(latents),
            "regressor_r2_on_drawn_faces": drawn,
            "regressor_r2_on_reconstructions": reconstructed,
            "rows": rows,
        }
        write_json(values.json, record)


if __name__ == "__main__":
    define_flags()
    startup.use_huge_pages()
    command_line.run(main)
