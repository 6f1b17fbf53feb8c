"""Explore a trained model in the browser: sliders, morphs, new faces and your own photographs.

python -m facevae_jax.explore --workdir=/tmp/quickstart

Prints the page's address, which only this machine can reach. Ctrl-C stops it. Photographs stay in memory.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError
from facevae_jax.latents.priors import FLOW, GAUSSIAN, PRIORS, STANDARD

flags.DEFINE_string("workdir", None, "Directory of the run, or of an exported model.")
_PORT = flags.DEFINE_integer("port", 0, "Where to listen on 127.0.0.1; 0: any free port.", 0, 65535)
_ATTRIBUTE = flags.DEFINE_list("attribute", [], "Attributes with a slider; by default a few of those with labels.")
flags.DEFINE_list("dimensions", [], "Latent dimensions with a slider; by default the strongest.")
_PRIOR = flags.DEFINE_list(
    "prior", [], f"Priors to draw new faces from: {', '.join(PRIORS)}; by default those at hand."
)


def main(arguments: list[str]) -> int:
    """Serves the page until Ctrl-C."""
    workdir, dimensions = command_line.workdir_of(arguments), command_line.numbers("dimensions", int)
    if wrong := [name for name in _PRIOR.value if name not in PRIORS]:
        raise UserError(f"--prior={wrong[0]!r} is not one of {', '.join(PRIORS)}.")
    try:
        serve(workdir, dimensions)
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0


def serve(workdir: pathlib.Path, dimensions: tuple[int, ...]) -> None:
    """Loads the model, makes its sliders and serves the page until Ctrl-C.

    Raises:
      UserError: the port is in use, there is no model, or it has no such attribute, dimension or prior.
    """
    from facevae_jax.data.sources import images
    from facevae_jax.exploring import server, sliders  # after the flags are checked: importing jax takes seconds
    from facevae_jax.exploring.explorer import Explorer
    from facevae_jax.trained.loading import load

    startup.keep_compiled_programs()
    images.ignore_warnings()
    with server.listen(_PORT.value) as listener:  # first, so that a port in use is reported before anything is computed
        trained = load(workdir)
        of_dimensions = sliders.dimension_sliders(trained, dimensions)
        attributes, lines = sliders.attribute_sliders(trained, _ATTRIBUTE.value)
        print(*lines, sep="\n", end="\n" if lines else "")
        # N(0, I) comes last: where the posteriors are far from it, it draws no faces.
        available = trained.available_priors()
        priors: Any = _PRIOR.value or [name for name in (FLOW, GAUSSIAN, STANDARD) if name in available]
        explorer = Explorer(trained, sliders=[*attributes, *of_dimensions], priors=priors, name=workdir.absolute().name)
        print(f"open {server.address(listener)} in a browser; Ctrl-C stops", flush=True)
        server.make_server(explorer).run(sockets=[listener])


if __name__ == "__main__":
    command_line.run(main)
