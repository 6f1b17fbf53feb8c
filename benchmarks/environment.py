"""Where a figure was measured: every result in benchmarks/results carries this."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
REPOSITORY = pathlib.Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """The device, the versions and the commit, with `+` after a commit whose files have changed since."""
    import jax

    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def git(*arguments: str) -> str:
    """The output of one git command in this repository."""
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
