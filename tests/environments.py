"""Environments in which commands are started: variables, locales, streams, signals, users, limits and disks.

    python -m tests.environments            # runs all, prints a line each, and exits with 1 if one ended badly

A case ends well where the exit code is one of those that it allows and nothing is a traceback.
"""

import dataclasses
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

REPOSITORY = pathlib.Path(__file__).parent.parent
SMALL = [
    "--config=quickstart",
    "--config.data.resolution=32",
    "--config.data.synthetic_train_images=64",
    "--config.data.synthetic_validation_images=16",
    "--config.data.data_dir=DATA",
    "--config.model.latent_dim=8",
    "--config.model.filters=(8,16,32)",
    "--config.train.epochs=1",
]
TRAIN = ["main", *SMALL, "--workdir=NEW"]
LONG = [*TRAIN, "--config.train.epochs=100000"]  # that only a signal ends
RESUME = ["main", *SMALL, "--workdir=RUN"]
SAMPLE = ["generate", "sample", "--count=2", "--prior=gaussian", "--workdir=RUN", "--output=NEW.png"]
EVALUATE = ["evaluate", "--workdir=RUN", "--importance_samples=1", "--samples=8", "--prior=gaussian", "--json=NEW.json"]
REPORT = ["report", "--workdir=RUN", "--output=NEW.html"]
EXPORT = ["export", "--workdir=RUN", "--output=NEW"]
WELL, REFUSED = (0,), (0, 2)
NUMERIC = (  # variables that change what JAX computes
    "JAX_ENABLE_X64=1",
    "JAX_DEFAULT_PRNG_IMPL=rbg",
    "JAX_THREEFRY_PARTITIONABLE=0",
    "JAX_RANDOM_SEED_OFFSET=7",
    "JAX_DEFAULT_MATMUL_PRECISION=bfloat16",
    "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "JAX_DEBUG_NANS=1",
    "JAX_DEBUG_INFS=1",
    "JAX_DISABLE_JIT=1",
    "JAX_ENABLE_CHECKS=1",
    "JAX_LEGACY_PRNG_KEY=error",
    "JAX_TRANSFER_GUARD=disallow",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and what is special about how it is started."""

    name: str
    words: list[str]
    allowed: tuple[int, ...] = WELL
    variables: dict[str, str | None] = dataclasses.field(default_factory=dict)  # None: unset
    shell: str = "COMMAND"  # what the shell runs
    signal: int = 0  # sent as soon as a step was trained, or a second after the start
    user: int = 0  # that it runs as, where the tests are root's


def cases() -> list[Case]:
    """All of them."""
    found = []

    def add(name: str, words: list[str], **options: object) -> None:
        found.append(Case(name, words, **options))  # type: ignore[arg-type]

    for each in NUMERIC:
        name, _, value = each.partition("=")
        add(each, SAMPLE, variables={name: value})
    add("all of these", RESUME, variables=dict(each.split("=") for each in NUMERIC))
    others = {
        "JAX_LOG_COMPILES=1": WELL,
        "JAX_LOGGING_LEVEL=DEBUG": WELL,
        "JAX_LOGGING_LEVEL=loud": REFUSED,
        "JAX_LOG_COMPILES=maybe": REFUSED,
        "JAX_TRACEBACK_FILTERING=off": WELL,
        "JAX_PLATFORMS=": WELL,
        "JAX_PLATFORMS=abacus": (2,),
        "JAX_PLATFORMS=cuda": REFUSED,
        "JAX_PLATFORMS=tpu": REFUSED,
        "JAX_NUM_CPU_DEVICES=3": WELL,
        "JAX_NUM_CPU_DEVICES=0": REFUSED,
        "JAX_NUM_CPU_DEVICES=many": (2,),
        "JAX_COMPILATION_CACHE_DIR=/proc/none": WELL,
        "JAX_COMPILATION_CACHE_DIR=/dev/null": WELL,
        "XLA_FLAGS=--xla_force_host_platform_device_count=8": WELL,
        "HOME=": WELL,
        "HOME=/proc/none": WELL,
        "XDG_CACHE_HOME=/proc/none": WELL,
        "TMPDIR=/proc/none": WELL,
        "PYTHONIOENCODING=ascii": WELL,
        "PYTHONIOENCODING=utf-16": WELL,
        "PYTHONOPTIMIZE=2": WELL,
        "PYTHONUNBUFFERED=1": WELL,
        "LC_ALL=C": WELL,
        "LC_ALL=xx_XX.latin": WELL,
        "LC_ALL=tr_TR.UTF-8": WELL,
        "COLUMNS=1": WELL,
        "TERM=": WELL,
        "TZ=Nowhere/None": WELL,
        "MPLBACKEND=none": WELL,
        "GLIBC_TUNABLES=glibc.none=1": WELL,
        "TF_CPP_MIN_LOG_LEVEL=x": WELL,
        "http_proxy=x": WELL,
        "NO_COLOR=1": WELL,
    }
    for each, allowed in others.items():
        name, _, value = each.partition("=")
        add(each, SAMPLE, variables={name: value}, allowed=allowed)
    add("no UTF-8", EVALUATE, variables={"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"})
    add("an empty environment", SAMPLE, shell="env -i PYTHONPATH=$PYTHONPATH COMMAND")
    add("optimized help", ["generate", "--help"], variables={"PYTHONOPTIMIZE": "2"})
    for name, words in {"training": TRAIN, "sample": SAMPLE}.items():
        add(f"{name}, stdout closed", words, shell="COMMAND >&-")
        add(f"{name}, stderr closed", words, shell="COMMAND 2>&-")
        add(f"{name}, all closed", words, shell="COMMAND <&- >&- 2>&-")
        add(f"{name}, stdout full", words, shell="COMMAND >/dev/full")
        add(f"{name}, stderr full", words, shell="COMMAND 2>/dev/full")
        add(f"{name}, both full", words, shell="COMMAND >/dev/full 2>&1")
        add(f"{name}, a reader that leaves", words, shell="COMMAND 2>&1 | true; exit ${PIPESTATUS[0]}")
    add("an error without stderr", ["generate", "sample", "--workdir=none"], allowed=(2,), shell="COMMAND 2>&-")
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = signal.Signals[name]
        add(f"training, {name}", LONG, signal=number, allowed=(128 + number,))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = signal.Signals[name]
        # It may come before Python handles signals, or when all is done.
        add(f"evaluate, {name}", EVALUATE, signal=number, allowed=(0, 128 + number, -number))
    add("SIGHUP under nohup", TRAIN, signal=signal.SIGHUP, shell="trap '' HUP; exec COMMAND")
    for name, words in {"sample": SAMPLE, "evaluate": EVALUATE, "report": REPORT, "export": EXPORT}.items():
        add(f"{name}, small files alone", words, shell="ulimit -f 1; COMMAND", allowed=REFUSED)
    for blocks in (20, 60):  # the images fit, a file of the checkpoint does not, and TensorStore has threads that go on
        add(f"training, files below {blocks} KiB", TRAIN, shell=f"ulimit -f {blocks}; COMMAND", allowed=REFUSED)
    add("few open files", SAMPLE, shell="ulimit -n 64; COMMAND", allowed=REFUSED)
    if os.getuid() == 0 and _others_can_run_python():
        nobody = {"HOME": None, "USER": None, "LOGNAME": None}
        add("a user without a name or home", [*SAMPLE[:-1], "--output=/tmp/x.png"], user=54321, variables=nobody)
        add("a reader of another's run", [*SAMPLE[:-1], "--output=/tmp/facevae-reader.png"], user=54321)
    add("a folder that is gone", SAMPLE, shell="mkdir gone && cd gone && rmdir ../gone && COMMAND", allowed=REFUSED)
    return found


def together(separate: list[Case]) -> list[Case]:
    """The cases, with those of one harmless variable merged into as few as have each variable once."""
    merged: list[Case] = []
    others = []
    for case in separate:
        if case != Case(case.name, SAMPLE, variables=case.variables) or case.name in NUMERIC:
            others.append(case)
            continue
        free = (i for i, kept in enumerate(merged) if not kept.variables.keys() & case.variables.keys())
        at = next(free, None)
        if at is None:
            merged.append(case)
        else:
            kept = merged[at]
            merged[at] = Case(f"{kept.name} {case.name}", SAMPLE, variables=kept.variables | case.variables)
    return merged + others


def _others_can_run_python() -> bool:
    path = pathlib.Path(sys.executable).resolve()
    return all(parent.stat().st_mode & 1 for parent in (path, *path.parents))


def run(case: Case, folder: pathlib.Path) -> tuple[int, str]:
    """The exit code and the output of a case, with the run `folder`/run that was trained before."""
    new = folder / f"new-{time.monotonic_ns()}"
    words = [word.replace("NEW", str(new)).replace("RUN", str(folder / "run")) for word in case.words]
    words = [word.replace("DATA", str(folder / "data")) for word in words]
    command = " ".join(["'" + word + "'" for word in (sys.executable, "-m", f"facevae_jax.{words[0]}", *words[1:])])
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    environment |= case.variables
    environment = {name: value for name, value in environment.items() if value is not None}

    other: dict[str, Any] = {"user": case.user, "group": case.user, "extra_groups": []} if case.user else {}
    process = subprocess.Popen(
        ["bash", "-c", case.shell.replace("COMMAND", command)],
        cwd=folder,
        env=environment,
        **other,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if case.signal:
        _wait_for_steps(new, process, seconds=60 if case.words[0] == "main" else 3)
        os.killpg(process.pid, case.signal)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def _wait_for_steps(workdir: pathlib.Path, process: subprocess.Popen, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            return
        time.sleep(0.1)


def failure(case: Case, folder: pathlib.Path) -> str:
    """What went wrong; empty where a case ended well."""
    if "--workdir=RUN" in case.words and not (folder / "run").exists():
        prepared(folder)
    code, output = run(case, folder)
    if code not in case.allowed:
        return f"exit code {code}, not one of {case.allowed}: {output.strip()[-300:]}"
    if "Traceback" in output or "Exception ignored" in output:
        return output.strip()[-2000:]
    if code == 2 and not any(line.startswith("error: ") for line in output.splitlines()) and ">&-" not in case.shell:
        return f"no line says why: {output.strip()[-300:]}"
    return ""


def prepared(folder: pathlib.Path) -> None:
    """Trains a small run in the folder that all may read."""
    folder.chmod(0o755)
    code, output = run(Case("the run", RESUME), folder)
    if code:
        raise RuntimeError(output)


def main(select: Callable[[Case], bool] = lambda case: True) -> int:
    """Runs the cases that are selected."""
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for case in filter(select, cases()):
            problem = failure(case, folder)
            bad += bool(problem)
            print(f"{'BAD ' if problem else 'well'}  {case.words[0]:9} {case.name}  {problem}", flush=True)
    print(f"{len(cases())} cases as {pwd.getpwuid(os.getuid()).pw_name}, {bad} ended badly")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(lambda case: not sys.argv[1:] or sys.argv[1] in case.name))
