"""Trains a model on faces, or resumes a run.

python -m facevae_jax.main --config=quickstart --workdir=/tmp/quickstart

--config is the name of one of the project's configs or the path of a file. Override any setting by its path:
--config.data.resolution=64 --config.train.batch_size=64.

On several hosts run the same command once on each. Cloud TPU, GKE, Slurm and Open MPI describe the cluster to their
processes; elsewhere add --coordinator=HOST:PORT --processes=N --process_id=I. launch/ has a script for each.
"""

import shlex
import signal
import time

from absl import flags
from ml_collections import config_flags

from facevae_jax.config import RunConfig, check_overrides, describe_settings
from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A config's name, or a file; override as --config.x.y=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, pictures, metrics, config.json.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds",
    60,
    "A process that is silent for this long is taken for dead, and the others end.",
    lower_bound=1,
)

_ACCEPT_NEW_DATA = flags.DEFINE_boolean(
    "accept_new_data", False, "Resume although the dataset was prepared anew with other images."
)


def main(arguments: list[str]) -> int:
    """Trains; the exit code is 0, or 128 + the signal's number if a signal stopped the run after a checkpoint."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: flags look like --name=value.")
    workdir: str | None = _WORKDIR.value
    if not flags.FLAGS["config"].present or not workdir:
        raise UserError(
            "--config or --workdir is missing: give both, such as --config=quickstart --workdir=/tmp/quickstart."
        )
    config = read_config()

    import jax

    from facevae_jax.core import hosts  # only for a valid config: importing JAX takes seconds
    from facevae_jax.core.signals import StopSignals
    from facevae_jax.trained.loading import load
    from facevae_jax.training import loop, telemetry

    startup.keep_compiled_programs()
    hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, heartbeat_seconds=_HEARTBEAT.value)
    if not jax.distributed.is_initialized():  # several processes may share the cores of a host
        startup.use_cores(config.train.batch_size // config.train.accumulation)
    signals = StopSignals(telemetry.log)
    began = time.perf_counter()
    loop.train(
        config,
        workdir,
        should_stop=lambda step: bool(signals.received()),
        started=startup.process_start(),
        accept_new_data=_ACCEPT_NEW_DATA.value,
    )
    seconds = time.perf_counter() - began
    (number,) = hosts.agree(signals.received())  # perhaps only one of the processes received it
    if number:
        telemetry.log(f"{signal.Signals(int(number)).name}: saved; the same command resumes here")
        return 128 + int(number)
    if jax.process_count() == 1:
        signals.end_at_once()
        try:
            if not load(workdir).keep_artifacts(training_seconds=seconds):
                telemetry.log(
                    "the learned prior is fitted when the first faces are sampled: it takes longer than it may here"
                )
        except UserError as error:
            telemetry.log(f"warning: the moments of the codes and the learned prior were not kept: {error}")
    telemetry.log(f"done: pictures, checkpoints and metrics are in {workdir}")
    telemetry.log(f"next: {shlex.join(['python', '-m', 'facevae_jax.generate', 'sample', f'--workdir={workdir}'])}")
    return 0


def read_config() -> RunConfig:
    """The checked config of `--config` and its overrides.

    Raises:
      UserError: the file cannot be loaded, or a key or value is impossible.
    """
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        if _CONFIG.value is None:
            raise UserError(f"--config={path!r}: get_config() returned None: return RunConfig(...).to_config_dict().")
        typed = config_flags.get_override_values(flags.FLAGS["config"])
        return RunConfig.from_config_dict(_CONFIG.value, typed)
    except OSError as error:  # ml_collections raises it on first access, for any error while it read the file
        raise UserError(
            f"--config={path!r} cannot be loaded: {command_line.one_line(error).rpartition('] ')[2]}"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(command_line.one_line(error)) from error


if __name__ == "__main__":
    startup.use_huge_pages()
    command_line.run(main, check_arguments=check_overrides, more_help=describe_settings)
