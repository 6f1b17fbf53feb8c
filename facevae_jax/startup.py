"""What a command sets up before it works: huge pages, and compiled programs that are kept between runs."""

import os
import pathlib
import sys

import psutil

CACHE = "facevae_jax/compiled"
MIN_COMPILE_SECONDS = 0.1  # a program that compiles faster is not worth a file; jax's own bound is 1 s
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """On Linux, starts this command again with malloc asking for transparent huge pages.

    XLA on CPU takes fresh memory for each dispatch's temporaries, hundreds of megabytes that fault in page by page;
    512 times fewer pages train up to a sixth faster. glibc reads the setting only as a process starts. Whoever sets it
    (to 0, say) is left alone.
    """
    tunables = os.environ.get(TUNABLES, "")
    if sys.platform != "linux" or HUGE_PAGES in tunables:
        return
    environment = os.environ | {TUNABLES: f"{tunables}:{HUGE_PAGES}=1".lstrip(":")}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def keep_compiled_programs() -> None:
    """Keeps compiled programs under ~/.cache, unless JAX_COMPILATION_CACHE_DIR names another place.

    The key of an entry holds the program, the versions, the flags and the processor's features. A folder that cannot be
    written to costs time only.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / CACHE))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def process_start() -> float:
    """Unix time at which this process was started, before any import."""
    return psutil.Process().create_time()
