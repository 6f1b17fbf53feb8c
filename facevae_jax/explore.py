"""A page in the browser to explore a trained model with: sliders, morphs, new faces and your own photographs.

python -m facevae_jax.explore --workdir=/tmp/quickstart

The page is served to this machine alone, at the address that is printed; Ctrl-C ends it. Photographs stay in memory.
"""

import sys
from typing import Any

from absl import flags

from facevae_jax import command_line, startup
from facevae_jax.errors import UserError, expand_home

PRIORS = ("standard", "gaussian", "mixture", "second_stage")

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or of an exported model.")
_PORT = flags.DEFINE_integer("port", 0, "Where to listen on 127.0.0.1; 0: any free port.", 0, 65535)
_ATTRIBUTE = flags.DEFINE_list(
    "attribute", [], "Attributes that get sliders; a handful of those with labels by default."
)
_DIMENSIONS = flags.DEFINE_list("dimensions", [], "Latent dimensions that get sliders; the strongest by default.")
_PRIOR = flags.DEFINE_list(
    "prior", [], f"What new faces are drawn from: {', '.join(PRIORS)}; the first two by default."
)


def main(arguments: list[str]) -> int:
    """Serves the page until Ctrl-C."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood: flags look like --name=value.")
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: give the directory of a training run.")
    if wrong := [name for name in _PRIOR.value if name not in PRIORS]:
        raise UserError(f"--prior={wrong[0]!r} is not one of {', '.join(PRIORS)}.")
    dimensions = [int(text) if text.isdecimal() else -1 for text in _DIMENSIONS.value]
    if -1 in dimensions:
        raise UserError(f"--dimensions={','.join(_DIMENSIONS.value)!r} must be whole numbers with commas between them.")
    try:
        serve(dimensions)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0


def serve(dimensions: list[int]) -> None:
    """Loads the model, makes its sliders and answers until Ctrl-C.

    Raises:
      UserError: the port is taken, there is no model, or it has no such attribute, dimension or prior.
    """
    workdir = expand_home(str(_WORKDIR.value), name="--workdir")

    from facevae_jax.exploring import sliders  # after the flags are checked: jax takes seconds to import
    from facevae_jax.exploring.explorer import Explorer
    from facevae_jax.exploring.server import PageServer
    from facevae_jax.generation import photographs
    from facevae_jax.generation.loading import load

    startup.keep_compiled_programs()
    photographs.ignore_bomb_warnings()
    with PageServer(_PORT.value) as server:  # first: that the port is taken is told before anything is computed
        trained = load(workdir)
        attributes, lines = sliders.attribute_sliders(trained, _ATTRIBUTE.value)
        print(*lines, sep="\n", end="\n" if lines else "")
        controls = [*attributes, *sliders.dimension_sliders(trained, dimensions)]
        # The fitted one first: where the posteriors are far from N(0, I), that gives no faces.
        priors: Any = _PRIOR.value or (["gaussian", "standard"] if trained.moments.images else ["standard"])
        explorer = Explorer(trained, sliders=controls, priors=priors, name=workdir.absolute().name)
        print(f"open {server.address} in a browser; Ctrl-C ends it", flush=True)
        server.serve(explorer)
    print("\nended.")


if __name__ == "__main__":
    command_line.run(main)
