"""From a trained model to pictures.

python -m facevae_jax.generate sample --workdir=/tmp/quickstart --count=64 --output=samples.png
"""

import math
import pathlib
from typing import cast

from absl import flags

from facevae_jax import command_line, startup
from facevae_jax.errors import UserError, expand_home, make_writable_directory

VERBS = ("sample",)

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_COUNT = flags.DEFINE_integer("count", 64, "Number of faces.", lower_bound=1, upper_bound=10_000)
_OUTPUT = flags.DEFINE_string("output", "samples.png", "PNG file to write: one grid.")
_PRIOR = flags.DEFINE_enum(
    "prior",
    "standard",
    ["standard", "gaussian"],
    "standard: N(0, I). gaussian: fitted to the posteriors of validation.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other faces.", lower_bound=0, upper_bound=2**32 - 1)


def main(arguments: list[str]) -> None:
    """Runs one verb."""
    if len(arguments) != 1 or arguments[0] not in VERBS:
        raise UserError(f"{' '.join(arguments)!r} is not understood: give one of {', '.join(VERBS)}, then flags.")
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: give the directory of a training run.")
    output = expand_home(_OUTPUT.value, name="--output")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={_OUTPUT.value!r} must end in .png.")
    if output.is_dir():
        raise UserError(f"--output={_OUTPUT.value!r} is a directory: give the name of a .png file.")
    make_writable_directory(output.parent, name="--output's directory")
    sample(expand_home(_WORKDIR.value, name="--workdir"), output)


def sample(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Draws faces from the chosen prior and writes them as one grid."""
    import numpy as np  # after the flags are checked: jax takes seconds to import

    from facevae_jax import pictures
    from facevae_jax.latents.priors import Prior, sample_prior
    from facevae_jax.random import named_key
    from facevae_jax.training.evaluation import decode
    from facevae_jax.training.restore import restore_model

    startup.keep_compiled_programs()
    trained = restore_model(workdir)
    if _PRIOR.value == "gaussian" and not trained.latent_moments.images:
        raise UserError("--prior=gaussian needs a run that was evaluated once: train on, or take --prior=standard.")
    key = named_key(_SEED.value, "sample")
    latents = np.asarray(sample_prior(cast(Prior, _PRIOR.value), key, _COUNT.value, trained.latent_moments))
    faces = decode(trained.model, trained.variables, latents)
    pictures.write_png(output, pictures.grid(faces, columns=math.ceil(math.sqrt(_COUNT.value))))
    print(f"{output}: {_COUNT.value} faces from step {trained.step:,}, prior {_PRIOR.value}")


if __name__ == "__main__":
    command_line.run(main)
