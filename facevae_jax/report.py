"""One HTML page about a run: curves, faces, the latent space and scores, in a file that needs nothing beside it.

python -m facevae_jax.report --workdir=/tmp/quickstart --compare=/tmp/other,/tmp/third

Needs the extra `report`: pip install "facevae-jax[report]".
"""

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home, writable_file

PAGE = "report.html"

flags.DEFINE_string("workdir", None, "Directory of the run that the page is about.")
_COMPARE = flags.DEFINE_list("compare", [], "Directories of other runs, for the curves and the trade-off.")
_OUTPUT = flags.DEFINE_string("output", None, f"File to write; WORKDIR/{PAGE} by default.")


def main(arguments: list[str]) -> None:
    """Writes the page."""
    workdir = command_line.workdir_of(arguments)
    compare = [expand_home(path, name="--compare") for path in _COMPARE.value if path]
    for path, flag in [(workdir, "--workdir"), *((path, "--compare") for path in compare)]:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{flag}={str(path)!r} {what}: give the workdir of a training.")
    output = expand_home(_OUTPUT.value, name="--output") if _OUTPUT.value else workdir / PAGE
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output={str(output)!r} must end in .html.")
    writable_file(output, name="--output")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('The report needs jinja2 and matplotlib: pip install "facevae-jax[report]".') from error

    from facevae_jax.reporting.write import write_report  # after the flags are checked: jax takes seconds to import

    startup.keep_compiled_programs()
    print(write_report(workdir, output, compare=compare))


if __name__ == "__main__":
    command_line.run(main)
