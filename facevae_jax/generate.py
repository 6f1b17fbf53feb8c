"""From a trained model to pictures and latents.

python -m facevae_jax.generate VERB --workdir=/tmp/quickstart

  sample        new faces                              --count --prior --temperature --seed --attribute=NAME=VALUE
  reconstruct   faces through encoder and decoder      --images | --split --rows --count
  interpolate   from face to face                      --images | --count; --steps --path --loop
  morph         between two photographs, or four       --images=A,B | --rows=I,J; --steps --path --loop
  edit          w_new = w + alpha x eta                --attribute --alpha --keep --direction; --images | --count
  traverse      one latent dimension after another     --dimensions --alpha; --images
  encode        latents, as .npz or .parquet           --images | --split; --posterior

--output says where and, by its ending, how: .png is one grid, .npz one array (arr_0, uint8 NHWC), .gif, .webp and .mp4
are animations, and no ending is a folder of single PNG files; or say --format. --scale=4 enlarges small pictures, and
--labels writes on a grid what its rows and columns are.
"""

import dataclasses
import math
from typing import Any

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError
from facevae_jax.generation.outputs import FORMATS
from facevae_jax.latents.priors import PRIORS

NUMBERS = {"rows": int, "dimensions": int, "alpha": float}  # flags that take several
VERB_NAMES = ("sample", "reconstruct", "interpolate", "morph", "edit", "traverse", "encode")

flags.DEFINE_string("workdir", None, "Directory of the run, or of an exported model.")
flags.DEFINE_string("output", None, "File or folder to write; VERB.png by default.")
flags.DEFINE_enum("format", None, FORMATS, "How to write it; by default as --output ends.")
flags.DEFINE_integer("count", None, "Faces, rows or dimensions.", lower_bound=1, upper_bound=10**8)
_IMAGES = flags.DEFINE(
    command_line.PathsParser(), "images", [], "Photographs, or folders of them, of any size; faces in the middle."
)
_SPLIT = flags.DEFINE_enum("split", None, ["train", "validation", "test"], "Faces of the run's own data.")
_ROWS = flags.DEFINE_list("rows", [], "Which of the split's images, by number; validation's without --split.")
flags.DEFINE_enum(
    "prior",
    None,
    list(PRIORS),
    "What new faces are drawn from. flow, the default where the run's data are there: learned. gaussian, mixture: "
    "fitted to the posteriors. standard: N(0, I).",
)
flags.DEFINE(
    command_line.TemperatureParser(),
    "temperature",
    1.0,
    "Factor on the prior's standard deviations; of a hierarchy also one from each resolution on, such as 1:1,16:0.8.",
)
flags.DEFINE_integer("seed", 0, "Another seed gives other faces.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_integer("scale", 1, "Each pixel becomes a square of so many on each side.", lower_bound=1, upper_bound=16)
flags.DEFINE_boolean("labels", False, "Write on a grid what its rows and columns are.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time; 0: what suits the resolution.", lower_bound=0)
flags.DEFINE_enum("posterior", "mean", ["mean", "sample"], "Which latent of a face is taken.")
flags.DEFINE_enum(
    "detail",
    "keep",
    ["keep", "prior", "mean"],
    "What becomes of a hierarchy's latents below the code: a face keeps its own, or they are drawn from their prior, "
    "or are at its mean.",
)
flags.DEFINE_integer(
    "detail_seed",
    None,
    "Of a hierarchy's latents below the code, where they are drawn; --seed by default.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_integer("steps", 8, "Pictures from each face to the next.", lower_bound=1, upper_bound=10_000)
flags.DEFINE_enum("path", "lerp", ["lerp", "slerp"], "Along a line, or an arc around the origin.")
flags.DEFINE_boolean("loop", False, "Lead back to the first picture, for an animation that repeats.")
_FPS = flags.DEFINE_float("fps", 12.0, "Pictures a second of an animation.", lower_bound=0.1, upper_bound=100.0)
flags.DEFINE_list(
    "attribute",
    [],
    "What to edit, such as smile; of sample, what new faces have: Smiling=1,Male=0.",
)
flags.DEFINE_list("keep", [], "Attributes that the edit is to leave as they are; all: every other one.")
flags.DEFINE_enum(
    "direction",
    "mean",
    ["mean", "regression", "curve"],
    "Difference of means (the paper's), logistic or ridge regression, or a way that bends with the means.",
)
flags.DEFINE_list("alpha", ["-3", "-2", "-1", "0", "1", "2", "3"], "How far, in standard deviations.")
flags.DEFINE_list("dimensions", [], "Latent dimensions, by number; those that change the face most by default.")


def main(arguments: list[str]) -> None:
    """Runs one verb."""
    if len(arguments) != 1 or arguments[0] not in VERB_NAMES:
        raise UserError(f"{' '.join(arguments)!r} is not understood: give one of {', '.join(VERB_NAMES)}, then flags.")
    workdir = command_line.workdir_of(arguments[1:])
    numbers = {name: command_line.numbers(name, kind) for name, kind in NUMBERS.items()}
    if math.isnan(_FPS.value):
        raise UserError("--fps=nan must be a number.")
    if (of_split := _SPLIT.value or _ROWS.value) and _IMAGES.value:
        raise UserError("--images beside --split or --rows: give the one or the other.")
    if arguments == ["sample"] and (_IMAGES.value or of_split):
        raise UserError("sample draws from a prior: leave --images, --split and --rows out, or take reconstruct.")

    from facevae_jax.data.sources import images  # after the flags are checked: jax takes seconds to import
    from facevae_jax.generation import verbs
    from facevae_jax.trained import labels
    from facevae_jax.trained.loading import load

    startup.keep_compiled_programs()
    images.ignore_warnings()
    given: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(verbs.Request)}
    request = verbs.Request(**given | numbers)
    trained = load(workdir, batch_size=_BATCH_SIZE.value)
    attributes = trained.dataset.attributes if request.attribute or request.keep else ()
    attribute, keep = (labels.with_commas(parts, attributes) for parts in (request.attribute, request.keep))
    print(verbs.VERBS[arguments[0]](trained, dataclasses.replace(request, attribute=attribute, keep=keep)))


if __name__ == "__main__":
    command_line.run(main)
