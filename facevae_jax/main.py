"""Trains a variational autoencoder on faces, or goes on with a run.

python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

Any setting is overridden by its path: --config.data.resolution=64 --config.model.latent_dim=32.

On several hosts the same command runs once on each. Cloud TPU, GKE, Slurm and Open MPI tell it where the others are;
elsewhere add --coordinator=HOST:PORT --processes=N --process_id=I. launch/ has a script for each.
"""

import signal

from absl import flags
from ml_collections import config_flags

from facevae_jax import command_line, startup
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with overrides as --config.x.y=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, pictures, metrics, config.json.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several processes: HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "A process that is silent for so long is dead, which ends the others.", lower_bound=1
)


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

    from facevae_jax import hosts  # after the config is checked: jax takes seconds to import
    from facevae_jax.signals import StopSignals
    from facevae_jax.training import loop, telemetry

    startup.keep_compiled_programs()
    hosts.join(
        hosts.Cluster(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value), heartbeat_seconds=_HEARTBEAT.value
    )
    signals = StopSignals(telemetry.say)
    loop.train(config, workdir, should_stop=lambda step: bool(signals.received()), started=startup.process_start())
    (number,) = hosts.agree(signals.received())  # which only one of the processes may have had
    if number:
        telemetry.say(f"{signal.Signals(int(number)).name}: saved; the same command goes on from here")
        return 128 + int(number)
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
