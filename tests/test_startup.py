"""How a command's process is set up before it computes."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from facevae_jax.core import startup
from facevae_jax.core.parallel import available_cpus
from facevae_jax.core.startup import MAX_CPU_DEVICES
from tests.conftest import CHEAP, REPOSITORY

CODE = """
import sys, jax
from facevae_jax.core import startup
startup.use_cores(int(sys.argv[1]))
print(jax.device_count())
"""


def devices(images: int, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | variables
    words = [sys.executable, "-c", CODE, str(images)]
    result = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif((psutil.cpu_count(logical=False) or 1) < 2, reason="one core")
def test_cores_are_devices_that_divide_the_batch():
    cores = min(psutil.cpu_count(logical=False), available_cpus(), MAX_CPU_DEVICES)
    assert devices(840) == cores  # 840 is a multiple of 1 to 8
    assert devices(839) == 1  # a prime
    assert devices(840, XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices(840, JAX_NUM_CPU_DEVICES="5") == 5


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_while_a_command_imports_ends_it_without_a_word_of_python(tmp_path, number):
    """Whether Python, JAX or the command itself is being imported."""
    words = [sys.executable, "-m", "facevae_jax.generate", "sample", f"--workdir={tmp_path / 'none'}"]
    for _ in range(2):  # the first reads files from the disk
        started = time.perf_counter()
        refused = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - started
    assert refused.returncode == 2
    codes = []
    for part in (0.15, 0.3, 0.45, 0.6, 0.75, 0.9):
        process = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        time.sleep(part * whole)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        codes.append(process.returncode)
        assert codes[-1] in (2, -number, 128 + number), said
        assert "Traceback" not in said
    assert codes[0] != 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_turns_into_its_own_error_ends_a_command(number):
    """As tensorstore does while it is imported."""
    program = f"""
import os
from facevae_jax.core import command_line
def main(argv):
    try:
        os.kill(os.getpid(), {int(number)})
        while True:
            pass
    except BaseException as error:
        raise ImportError("initialization failed") from error
command_line.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (128 + number, f"{number.name}: ended\n")


PROGRAM = """
import sys, warnings, jax
from facevae_jax.core import startup
startup.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
warnings.warn("another warning")
"""


@pytest.mark.slow
def test_cached_programs_that_were_cut_short_are_replaced_without_a_word(tmp_path):
    """A process killed while it writes an entry, and a disk that was full, leave half of one."""

    def entries():
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        assert "another warning" in result.stderr
        assert "cache" not in result.stderr
        return {path.name: path.stat().st_size for path in tmp_path.glob("*-cache")}

    whole = entries()
    assert whole
    for keep in (0.5, 0):
        for name, size in whole.items():
            os.truncate(tmp_path / name, int(keep * size))
        assert set(entries()) == set(whole)
        assert min(entries().values()) > 0.9 * min(whole.values())


def test_entries_that_the_system_could_not_read_are_kept_and_told(tmp_path):
    shown = []
    show = startup.without_unusable_entries(lambda message, *_: shown.append(message), tmp_path)
    for reason, left in (("PermissionError: denied", 2), ("OSError: stale", 2), ("ZstdError: cut", 1)):
        (tmp_path / "jit_f-1-cache").touch()
        (tmp_path / "jit_g-1-cache").touch()
        show(
            UserWarning(f"Error reading persistent compilation cache entry for 'jit_f': {reason}"), UserWarning, "x", 1
        )
        assert len(list(tmp_path.iterdir())) == left
    assert len(shown) == 2


@pytest.mark.slow
def test_processes_that_share_a_host_have_one_device_each(tmp_path):
    """Two images cannot be cut for all the cores of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = ("data.resolution=32", "data.synthetic_train_images=64", "data.synthetic_validation_images=8")
    settings += ("train.batch_size=2", "train.steps=2", f"data.data_dir={tmp_path / 'data'}")
    words = [sys.executable, "-m", "facevae_jax.main", "--config=quickstart", f"--workdir={tmp_path / 'run'}"]
    words += [*(f"--config.{each}" for each in settings), f"--coordinator={address}", "--processes=2"]
    environment = os.environ | {"XLA_FLAGS": CHEAP}
    started = [
        subprocess.Popen(
            [*words, f"--process_id={number}"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "2 x cpu in 2 processes" in outputs[0]
