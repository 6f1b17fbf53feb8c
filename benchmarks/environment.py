"""Where a figure was measured: every result in benchmarks/results carries this."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Of the environment, which change the speed.
VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
COMMIT_VARIABLE = "MEASURED_COMMIT"  # names the commit of a copy that has no history
MEASURED = ("facevae_jax", "configs")
REPOSITORY = pathlib.Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """The device, the versions and the commit of the measured code."""
    import jax

    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
    }


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The last commit that changed the measured code, with `+` where it has been changed since.

    In a copy of the files without their history, or without git, what the variable MEASURED_COMMIT says.
    """
    if not (REPOSITORY / ".git").exists():
        return os.environ.get(COMMIT_VARIABLE, "unknown")
    try:
        changed = git("diff", "HEAD", "--", *MEASURED)
        return git("log", "-1", "--format=%H", "--", *MEASURED) + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE, "unknown")


def git(*arguments: str) -> str:
    """The output of one git command in this repository."""
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
