"""What the command-line modules share: flag parsing and errors of one line with exit code 2."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from facevae_jax.errors import UserError


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Parses the flags, calls `main` with the positional arguments and exits.

    Exit codes: what `main` returns (None is 0); 2 and one line on standard error for a `UserError` or a bad flag.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # the libraries' notes would drown the run's own lines
    try:
        arguments = parse_flags(sys.argv if argv is None else argv)
        code = main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses `argv` into absl's FLAGS and returns the positional arguments.

    Raises:
      UserError: an unknown flag or configuration key, or a value that cannot be read.
    """
    try:
        positional = flags.FLAGS(argv)[1:]
    except SystemExit:
        raise
    except Exception as error:  # a config file is Python: importing it may raise anything
        raise UserError(one_line(error)) from error
    if flags.FLAGS.is_parsed() and getattr(flags.FLAGS, "help", False):
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    return positional


def one_line(error: BaseException) -> str:
    """The error's message with its line breaks folded away."""
    return " ".join(str(error).split()) or type(error).__name__
