import errno
import fcntl
import os
import resource
from contextlib import nullcontext

import pytest

from facevae_jax.core import files


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    path = tmp_path / "run.lock"
    with files.locked(path, wait=False):
        with pytest.raises(BlockingIOError) as caught, files.locked(path, wait=False):
            pass
        assert f"process {os.getpid()} on " in caught.value.strerror
    with files.locked(path, wait=False):
        pass


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(errno.ENOLCK, nullcontext()), (errno.EIO, pytest.raises(OSError, match=os.strerror(errno.EIO)))],
)
def test_a_file_system_without_locks_stops_nothing_and_other_errors_are_raised(tmp_path, monkeypatch, number, outcome):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with outcome, files.locked(tmp_path / "run.lock", wait=False):
        assert (tmp_path / "run.lock").exists()


def test_a_write_that_fails_says_which_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, files.atomic_writer(tmp_path / "x") as file:
            file.write(bytes(5_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
