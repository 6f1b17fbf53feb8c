"""The watchdog, in processes of its own: pytest uses the same timer of faulthandler."""

import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

HANG = """
import time
from facevae_jax.training.watchdog import Watchdog
def hang(): time.sleep(600)
with Watchdog({seconds}) as watchdog:
    for step in range(4, 8):
        time.sleep(0.5)
        watchdog.heartbeat(step)
    print(watchdog.step, flush=True)
    {then}
"""


def run(seconds: int, then: str) -> subprocess.CompletedProcess:
    program = HANG.format(seconds=seconds, then=then)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, check=False
    )


def test_a_hang_ends_the_run_and_shows_where_it_was():
    started = time.monotonic()
    result = run(1, "hang()")
    assert time.monotonic() - started >= 3  # the four steps, then one second without a heartbeat
    assert result.returncode == 1
    assert result.stdout == "7\n"
    assert "in hang" in result.stderr


def test_a_run_that_ends_leaves_no_timer_and_zero_seconds_set_none():
    assert run(1, "watchdog.__exit__(); time.sleep(2)").returncode == 0
    assert run(0, "time.sleep(2)").returncode == 0
