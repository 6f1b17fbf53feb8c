"""Trains a variational autoencoder on faces, or goes on with a run.

python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

Any setting is overridden by its path: --config.data.resolution=64 --config.model.latent_dim=32.
"""

import signal

from absl import flags
from ml_collections import config_flags

from facevae_jax import command_line, startup
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with overrides as --config.x.y=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, pictures, metrics, config.json.")


def main(arguments: list[str]) -> int:
    """Trains; the exit code is 0, or 128 + the signal's number after a stop that saved first."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood: flags look like --name=value.")
    workdir: str | None = _WORKDIR.value
    if _CONFIG.value is None and flags.FLAGS["config"].present:
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"--config={path!r}: get_config() gave None: let it return RunConfig(...).to_config_dict().")
    if _CONFIG.value is None or not workdir:
        raise UserError("--config and --workdir are needed: --config=configs/quickstart.py --workdir=/tmp/quickstart.")
    config = read_config()

    from facevae_jax.training import loop, telemetry  # after the config is checked: jax takes seconds to import

    startup.keep_compiled_programs()

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one raises KeyboardInterrupt
        telemetry.say(f"{signal.Signals(number).name}: saving after this dispatch; once more ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        loop.train(config, workdir, should_stop=lambda step: bool(received), started=startup.process_start())
    except KeyboardInterrupt:
        telemetry.say("ended at once; the same command goes on from the last checkpoint")
        return 128 + received[0]
    if received:
        telemetry.say(f"{signal.Signals(received[0]).name}: saved; the same command goes on from here")
        return 128 + received[0]
    telemetry.say(f"done: pictures, checkpoints and metrics are in {workdir}")
    return 0


def read_config() -> RunConfig:
    """The checked config of `--config` and its overrides.

    Raises:
      UserError: the file cannot be loaded, or a key or value is impossible.
    """
    try:
        return RunConfig.from_config_dict(_CONFIG.value)
    except OSError as error:  # what ml_collections makes of any fault in the file
        message = f"--config={config_flags.get_config_filename(flags.FLAGS['config'])!r} cannot be loaded"
        raise UserError(f"{message}: {command_line.one_line(error).rpartition('] ')[2]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(command_line.one_line(error)) from error


if __name__ == "__main__":
    startup.use_huge_pages()
    command_line.run(main, check_arguments=check_overrides)
