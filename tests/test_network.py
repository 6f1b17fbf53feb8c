"""Two hosts in network namespaces of this machine: training across them, and a cut cable."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.conftest import CHEAP, REPOSITORY
from tests.test_processes import STEPS, alone, assert_same_losses, command, record, warm_config

pytestmark = pytest.mark.network
__all__ = ["alone", "warm_config"]  # fixtures

HOSTS = ("facevae-a", "facevae-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 39_741


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces joined by a cable, each with a host name that resolves to its address there."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs ip (iproute2) and unshare")
    with contextlib.ExitStack() as stack:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
                stack.callback(ip, "netns", "delete", host)
            ip("link", "add", "cable", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable", "netns", HOSTS[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
        lines = [f"{address} {host}\n" for host, address in zip(HOSTS, ADDRESSES, strict=True)]
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
            folder = pathlib.Path("/etc/netns", host)
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        yield


def start(words: list[str], number: int, log: pathlib.Path) -> subprocess.Popen[bytes]:
    """The command on one host, as process `number` of two."""
    where = [
        f"--coordinator={ADDRESSES[0]}:{PORT}",
        "--processes=2",
        f"--process_id={number}",
        "--heartbeat_seconds=10",
    ]
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', HOSTS[number]]
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", HOSTS[number], *named, *words, *where],
            cwd=REPOSITORY,
            env=os.environ | {"XLA_FLAGS": CHEAP, "NPROC": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for(log: pathlib.Path, pattern: str, *, seconds: float = 600) -> str:
    deadline = time.monotonic() + seconds
    while not re.search(pattern, text := log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return text


def test_a_cut_cable_ends_both_and_the_run_resumes_when_it_is_repaired(hosts, alone, warm_config, tmp_path):
    workdir = tmp_path / "run"
    words = command(warm_config, workdir, checkpoint_every_steps=3)
    logs = [tmp_path / f"{number}.log" for number in (0, 1)]
    both = [start(words, number, logs[number]) for number in (0, 1)]
    wait_for(logs[0], r"step +8/")
    ip("-n", HOSTS[0], "link", "set", "cable", "down")
    codes = [process.wait(timeout=300) for process in both]
    assert all(codes), [log.read_text() for log in logs]
    ip("-n", HOSTS[0], "link", "set", "cable", "up")
    both = [start(words, number, logs[number]) for number in (0, 1)]
    codes = [process.wait(timeout=600) for process in both]
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert re.search(r"resuming from step \d", logs[0].read_text())
    assert record(workdir, STEPS)["evaluated"]
    assert_same_losses(workdir, alone)
