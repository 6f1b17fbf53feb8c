"""How a command's process is set up before it computes."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from facevae_jax.core.parallel import available_cpus
from facevae_jax.core.startup import MAX_CPU_DEVICES
from tests.conftest import REPOSITORY

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
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    started = [
        subprocess.Popen(
            [*words, f"--process_id={number}"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "2 x cpu in 2 processes" in outputs[0]
