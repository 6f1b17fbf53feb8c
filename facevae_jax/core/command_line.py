"""What all commands share: the process they run in, parsing flags, and errors in one line with exit code 2."""

import logging as standard_logging
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags, logging

from facevae_jax.core import named_configs, numerics, streams
from facevae_jax.core.errors import UserError, expand_home, in_command, of_environment

# Signals that end a command. It first deletes the files that it has only half written.
ENDING = (signal.SIGTERM, signal.SIGHUP)
# What Python and absl say of a value that is no number, and what a user reads.
PLAIN_WORDS = (
    (r"invalid literal for int\(\) with base \d+: '(.*)'$", r"'\1' is no whole number"),
    (r"could not convert string to float: '(.*)'$", r"'\1' is no number"),
    (r"\('Non-boolean argument to boolean flag', '(.*)'\)$", r"'\1' is neither true nor false"),
)
RESEND_SECONDS = 0.05  # after the callback in which a signal was lost


def run(
    main: Callable[[list[str]], int | None],
    *,
    check_arguments: Callable[[list[str]], None] = lambda argv: None,
    more_help: Callable[[], str] = lambda: "",
) -> NoReturn:
    """Parses the flags, calls `main` with the positional arguments and exits.

    `check_arguments` gets the command line before it is parsed and may raise a better error than the parser's;
    `more_help` gives what --help prints after the flags.

    Exit codes: what `main` returns (None is 0); 2 and one line on standard error for a `UserError`, a bad flag or
    something wrong with the machine; 128 + the signal's number where a signal ended it.
    """
    streams.make_unbreakable()
    numerics.ignore_variables()
    code: int | None = 2
    try:
        _end_at_signals()
        _silence_other_threads()
        with in_command():
            code = main(parse_flags(sys.argv, check_arguments, more_help))
    except UserError as error:
        if str(error):  # empty: another process prints it
            print(f"error: {error}", file=sys.stderr)
    except EndedError as error:
        _leave(error.number)
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt | EndedError):  # compiled code raises its own from it
            _leave(_number(error.__cause__))
        if not (line := of_environment(error)):
            raise
        print(f"error: {line}", file=sys.stderr)
    streams.finish()
    sys.exit(code)


def _silence_other_threads() -> None:
    """Silences what libraries print about errors that they also raise in the main thread, such as a full disk.

    A signal that comes within a callback, such as that of JAX at a garbage collection, still ends the command.
    """
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)  # futures of a checkpoint that failed
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt | EndedError):  # it came within a callback, which lost it: send it again
            threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), _number(error))).start()
        elif str(error) != "Event loop is closed":  # threads of tensorstore end after the checkpoint has failed
            show(unraisable)

    sys.unraisablehook = show_others


def _leave(number: int) -> NoReturn:
    """Ends at once: threads that still compile or compute would crash a normal exit."""
    print(f"{signal.Signals(number).name}: ended", file=sys.stderr)
    streams.finish()
    os._exit(128 + number)


class EndedError(BaseException):
    """A signal asked the command to end; not an Exception, so that nothing handles it as a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _number(error: KeyboardInterrupt | EndedError) -> int:
    """The signal that raised it."""
    return error.number if isinstance(error, EndedError) else signal.SIGINT


def _end_at_signals() -> None:
    """Raises an EndedError or KeyboardInterrupt at a signal, unless it is ignored, as `nohup` does."""

    def end(number: int, frame: Any) -> NoReturn:
        if "jaxlib" in sys.modules and not hasattr(sys.modules.get("jax"), "numpy"):
            _leave(number)  # an exception while JAX is imported crashes the process
        raise KeyboardInterrupt if number == signal.SIGINT else EndedError(number)

    for number in (*ENDING, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def parse_flags(
    argv: list[str], check_arguments: Callable[[list[str]], None], more_help: Callable[[], str] = lambda: ""
) -> list[str]:
    """Parses `argv` into absl's FLAGS and returns the positional arguments. A flag `--config` may name a config.

    Raises:
      UserError: an unknown flag, config or configuration key, or a value that cannot be read.
    """
    if set(argv[1:]) & {"--help", "-help", "-h", "-?"}:
        print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}\n{more_help()}")
        sys.exit(0)
    if "config" in flags.FLAGS:
        argv = named_configs.with_paths(argv)
    try:
        check_arguments(argv[1:])
        return flags.FLAGS(argv)[1:]
    except (flags.Error, TypeError) as error:
        raise UserError(_plain(one_line(error))) from error
    except Exception as error:  # a config file is Python: loading it may raise anything
        given = next((argument for argument in argv if argument.lstrip("-").startswith("config=")), "the command line")
        if line := of_environment(error):
            raise UserError(line) from error
        key = str(error).strip("\"'")
        typed = [argument for argument in argv if argument.partition("=")[0].endswith(f".{key}")]
        if isinstance(error, AttributeError) and typed:
            raise UserError(
                f"{typed[0]}: {given} has no such setting; a model's depend on config.model.kind."
            ) from error
        raise UserError(f"{given}: {type(error).__name__}: {one_line(error)}") from error


def _plain(message: str) -> str:
    """The message of a flag's parser without Python's words."""
    for pattern, words in PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return message


def workdir_of(arguments: list[str]) -> pathlib.Path:
    """The value of `--workdir`, of a command that takes flags alone.

    Raises:
      UserError: there are positional arguments, or it is missing.
    """
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: flags look like --name=value.")
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: give the directory of a training run.")
    return expand_home(flags.FLAGS.workdir, name="--workdir")


def numbers(name: str, kind: type) -> tuple:
    """The values of a flag that takes several numbers, int or float.

    Raises:
      UserError: one of them is not a number.
    """
    texts = flags.FLAGS[name].value or []
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{name}={','.join(texts)!r} must be {what} with commas between them.") from error


class PathsParser(flags.ArgumentParser):
    """Of a flag that takes paths with commas between them, which may have commas themselves: the longest that exist."""

    syntactic_help = "paths with commas between them"

    def parse(self, argument: Any) -> list[str]:
        """The paths."""
        if not isinstance(argument, str):
            return list(argument)
        parts, found = argument.split(","), []
        while parts:
            counts = (n for n in range(len(parts), 1, -1) if pathlib.Path(",".join(parts[:n]).strip()).exists())
            count = next(counts, 1)
            found.append(",".join(parts[:count]).strip())
            parts = parts[count:]
        return [path for path in found if path]


class TemperatureParser(flags.ArgumentParser):
    """Of a flag that takes one number, or pairs such as 1:1.0,16:0.8: a number for each resolution."""

    syntactic_help = "a number, or pairs such as 1:1.0,16:0.8"

    def parse(self, argument: Any) -> float | dict[int, float]:
        """The number, or numbers by resolution."""
        if not isinstance(argument, str):
            return argument
        try:
            if ":" not in argument:
                return float(argument)
            pairs = [part.split(":") for part in argument.split(",")]
            return {int(resolution): float(number) for resolution, number in pairs}
        except ValueError as error:
            raise ValueError(f"must be {self.syntactic_help}") from error


def one_line(error: BaseException) -> str:
    """The error's message without line breaks; of a traceback in it, only the last line."""
    head, traceback, rest = str(error).partition("Traceback (most recent call last):")
    text = head + rest.strip().splitlines()[-1] if traceback else head
    return " ".join(text.split()) or type(error).__name__
