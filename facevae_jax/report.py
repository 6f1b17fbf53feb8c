"""One HTML page about a run: curves, faces, the latent space and scores, in a file that needs nothing beside it.

python -m facevae_jax.report --workdir=/tmp/quickstart --compare=/tmp/other,/tmp/third

Needs the extra `report`: pip install "facevae-jax[report]".
"""

import pathlib

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home, make_writable_directory

PAGE = "report.html"

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run that the page is about.")
_COMPARE = flags.DEFINE_list("compare", [], "Directories of other runs, for the curves and the trade-off.")
_OUTPUT = flags.DEFINE_string("output", None, f"File to write; WORKDIR/{PAGE} by default.")


def main(arguments: list[str]) -> None:
    """Writes the page."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood: flags look like --name=value.")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: give the directory of a training run.")
    workdir = expand_home(_WORKDIR.value, name="--workdir")
    compare = [expand_home(path, name="--compare") for path in _COMPARE.value if path]
    for path, flag in [(workdir, "--workdir"), *((path, "--compare") for path in compare)]:
        if not path.is_dir():
            raise UserError(f"{flag}={str(path)!r} does not exist: give the workdir of a training.")
    output = check_output(expand_home(_OUTPUT.value, name="--output") if _OUTPUT.value else workdir / PAGE)
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('The report needs jinja2 and matplotlib: pip install "facevae-jax[report]".') from error

    from facevae_jax.reporting.write import write_report  # after the flags are checked: jax takes seconds to import

    startup.keep_compiled_programs()
    print(write_report(workdir, output, compare=compare))


def check_output(path: pathlib.Path) -> pathlib.Path:
    """The path, if a page can be written there.

    Raises:
      UserError: it cannot.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output={str(path)!r} must end in .html.")
    if path.is_dir():
        raise UserError(f"--output={str(path)!r} is a folder: give the name of a .html file.")
    make_writable_directory(path.parent, name="--output's directory")
    return path


if __name__ == "__main__":
    command_line.run(main)
