"""The machine, versions and commit of a measurement; every file in benchmarks/results holds these."""

import contextlib
import os
import pathlib
import platform
import re
import subprocess
from importlib import metadata
from typing import Any

from facevae_jax.core.parallel import available_cpus

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Environment variables that change the speed.
VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
MEASURED = ("facevae_jax", "configs")
REPOSITORY = pathlib.Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """The device, the versions and the commit of the measured code."""
    import jax

    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": cpu_name(),
        "cpu_cores": available_cpus(),
        "platform": f"{platform.system()} {platform.machine()}",
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name, if the system tells it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found.group(1) if found else "unknown"
    return platform.processor()


def commit() -> str:
    """The last commit that changed the measured code, with `+` if it has uncommitted changes."""

    def git(*arguments: str) -> str:
        words = ["git", *arguments, "--", *MEASURED]
        return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

    if (REPOSITORY / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return git("log", "-1", "--format=%H") + ("+" if git("diff", "HEAD") else "")
    return "unknown"


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config, as in `config.json`, without the paths of one machine."""
    data = {key: value for key, value in config["data"].items() if key not in ("data_dir", "cache_dir")}
    return config | {"data": data}
