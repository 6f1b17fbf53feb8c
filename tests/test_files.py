import errno
import fcntl
import os

import pytest

from facevae_jax import files


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    path = tmp_path / "run.lock"
    with files.locked(path, wait=False):
        with pytest.raises(BlockingIOError) as caught, files.locked(path, wait=False):
            pass
        assert f"process {os.getpid()} on " in caught.value.strerror
    with files.locked(path, wait=False):
        pass


def flock_answers(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    flock_answers(monkeypatch, errno.ENOLCK)
    with files.locked(tmp_path / "run.lock", wait=False):
        assert (tmp_path / "run.lock").exists()


def test_any_other_error_of_a_lock_is_raised(tmp_path, monkeypatch):
    flock_answers(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), files.locked(tmp_path / "run.lock", wait=False):
        pass
