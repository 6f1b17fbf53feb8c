"""Reads the attributes off samples of drawn faces: are they distributed as in the data, and inside its range?

python -m benchmarks.drawn_samples --workdir=/tmp/quickstart --json=benchmarks/results/drawn_samples.json

A regressor that never saw the model reads samples, reconstructions and the drawn faces themselves. Per attribute the
figure is the Kolmogorov-Smirnov distance to its readings of the validation faces. A reading is outside where none of
the training faces' own readings is, but for a tolerance of `SLACK` of the attribute's range. (The range of a thousand
faces is narrower than the data's: other drawn faces would be outside of it.)
"""

from typing import Any

import numpy as np
import scipy.stats
from absl import flags

from benchmarks.attribute_regressor import spread, train_regressor
from benchmarks.environment import environment
from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home, writable_file
from facevae_jax.core.files import write_json
from facevae_jax.data.drawn.synthetic import ATTRIBUTES
from facevae_jax.latents.priors import PRIORS
from facevae_jax.trained.loading import load

SLACK = 0.05  # of the range of an attribute
FACES = 1_024  # of the validation split
SAMPLES = 4_096

flags.DEFINE_string("workdir", None, "Of a run on drawn faces.")
_PRIORS = flags.DEFINE_list("priors", ["flow", "gaussian"], f"Which of {', '.join(PRIORS)}.")
_JSON = flags.DEFINE_string("json", None, "File to write.")


def main(arguments: list[str]) -> None:
    """Measures, prints and writes."""
    workdir = command_line.workdir_of(arguments)
    output = expand_home(_JSON.value, name="--json") if _JSON.value else None
    if output:
        writable_file(output, name="--json")
    startup.keep_compiled_programs()
    trained = load(workdir)
    if trained.dataset.name != "synthetic":
        raise UserError(f"--workdir={str(workdir)!r} must be a run on drawn faces.")
    drawn = np.asarray(trained.dataset.images(trained.dataset.evaluation_split)[:FACES])
    read = train_regressor(resolution=trained.resolution)
    mean, deviation = spread()
    truth = read(drawn) * deviation + mean
    slack = SLACK * np.array([attribute.high - attribute.low for attribute in ATTRIBUTES])
    of_data = read(np.asarray(trained.dataset.images("train"))) * deviation + mean
    low, high = of_data.min(axis=0) - slack, of_data.max(axis=0) + slack
    sets = {"validation faces": drawn, "reconstructions": trained.reconstruct(drawn)}
    sets |= {f"samples, {prior}": trained.sample(SAMPLES, prior=prior) for prior in _PRIORS.value}
    record: dict[str, Any] = {
        "what": __doc__,
        "faces": len(drawn),
        "faces_of_the_range": len(of_data),
        "samples": SAMPLES,
        "step": trained.step,
        "sets": {},
    }
    for name, images in sets.items():
        values = read(images) * deviation + mean
        outside = (values < low) | (values > high)
        distance = {
            attribute.name: float(scipy.stats.ks_2samp(values[:, number], truth[:, number]).statistic)
            for number, attribute in enumerate(ATTRIBUTES)
        }
        record["sets"][name] = {
            "kolmogorov_smirnov": distance,
            "largest": max(distance.values()),
            "mean": float(np.mean(list(distance.values()))),
            "outside": float(outside.any(axis=1).mean()),
            "outside_by_attribute": dict(zip(distance, outside.mean(axis=0, dtype=np.float64).tolist(), strict=True)),
        }
        found = record["sets"][name]
        print(
            f"{name}: mean distance {found['mean']:.3f}, largest {found['largest']:.3f}, outside {found['outside']:.1%}"
        )
    if output:
        write_json(output, record | environment())


if __name__ == "__main__":
    command_line.run(main)
