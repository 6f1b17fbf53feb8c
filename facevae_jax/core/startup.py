"""Process setup at the start of a command: huge pages and the cache of compiled programs."""

import contextlib
import os
import pathlib
import re
import sys
import warnings
from typing import Any

import psutil

from facevae_jax.core import streams
from facevae_jax.core.parallel import available_cpus

CACHE = "facevae_jax/compiled"
UNUSABLE_ENTRY = re.compile(r"Error reading persistent compilation cache entry for '([\w.]+)': (\w+)")
SYSTEM_ERRORS = {"OSError", *(error.__name__ for error in OSError.__subclasses__())}  # the entry itself may be whole
MIN_COMPILE_SECONDS = 0.1  # faster compilations are not worth a file; JAX's default is 1 s
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
MAX_CPU_DEVICES = 8  # each holds a copy of the parameters, and waits for the others


def use_huge_pages() -> None:
    """On Linux, restarts this command with malloc asking for transparent huge pages.

    XLA on CPU allocates fresh memory for the temporaries of each dispatch, hundreds of megabytes that fault in page by
    page; with huge pages training is up to a sixth faster. glibc reads the setting only when a process starts. A value
    set by the user (such as 0) is kept.
    """
    tunables = os.environ.get(TUNABLES, "")
    if sys.platform != "linux" or HUGE_PAGES in tunables:
        return
    streams.make_unbreakable()
    environment = os.environ | {TUNABLES: f"{tunables}:{HUGE_PAGES}=1".lstrip(":")}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def use_cores(images: int) -> None:
    """Makes each core a device of the CPU, so that cores compute on different images: without effect elsewhere.

    XLA divides an operation among its threads, and those on a few images in the cache are too short for that. On 2
    cores steps of `gdl128` are a fifth faster with two devices than with one. A count in XLA_FLAGS or in
    JAX_NUM_CPU_DEVICES is kept.

    Args:
      images: computed at a time; the devices divide them.
    """
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = min(psutil.cpu_count(logical=False) or 1, available_cpus(), MAX_CPU_DEVICES)
    jax.config.update("jax_num_cpu_devices", next(n for n in range(cores, 0, -1) if images % n == 0))


def keep_compiled_programs() -> None:
    """Caches compiled programs under ~/.cache, or in JAX_COMPILATION_CACHE_DIR.

    JAX's cache key covers the program, the versions, the flags and the processor's features. If the folder is not
    writable, programs are compiled again.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        try:
            home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor an entry in the passwd file, as in some containers
            return
        folder = str(pathlib.Path(home) / CACHE)
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    warnings.showwarning = without_unusable_entries(warnings.showwarning, pathlib.Path(folder))


def without_unusable_entries(show: Any, folder: pathlib.Path) -> Any:
    """A `warnings.showwarning` that deletes programs that cannot be read from the cache in `folder`.

    It passes on every other warning.

    JAX writes an entry in place, so a process that is killed, or a full disk, leaves half of one. JAX then warns at
    each start, and never replaces the file. Once it is gone, the program that is compiled next takes its place.
    """

    def show_others(message: Warning | str, *arguments: Any, **keywords: Any) -> None:
        found = UNUSABLE_ENTRY.match(str(message))
        if not found or found[2] in SYSTEM_ERRORS:
            show(message, *arguments, **keywords)
            return
        # The warning has the program's name without the rest of the key: other entries of that name go too.
        for entry in folder.glob(f"{found[1]}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()

    return show_others


def process_start() -> float:
    """Unix time at which this process started, before any import."""
    return psutil.Process().create_time()
