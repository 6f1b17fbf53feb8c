"""Device counts that a batch or a split does not fit: what the error advises works."""

import os
import re
import shlex

import pytest

from tests.conftest import assert_one_line_error, change, flags_of, run_module


def follow(error: str, monkeypatch) -> list[str]:
    """The flags that an error advises; a variable that it advises is set."""
    if found := re.search(r"JAX_NUM_CPU_DEVICES=\d+", error):
        monkeypatch.setenv(*found[0].split("="))
    return [word.rstrip(".") for word in shlex.split(error) if word.startswith("--config.")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "data", "first"),
    [
        ({"batch_size": 4}, {}, 4),  # resumes on more devices than images in a batch
        ({"batch_size": 8, "accumulation": 2}, {}, 2),
        ({"batch_size": 64, "accumulation": 4}, {"synthetic_train_images": 20}, 0),
        ({"batch_size": 8}, {"synthetic_train_images": 5}, 0),
    ],
    ids=["resume", "parts", "split in parts", "split below devices"],
)
def test_what_an_error_about_eight_devices_advises_works(tiny_config, tmp_path, monkeypatch, train, data, first):
    config = change(tiny_config, train={**train, "steps": 1, "epochs": 1}, data=data)
    if first:
        flags = flags_of(config)
        result = run_module("facevae_jax.main", *flags, f"--workdir={tmp_path}", devices=first)
        assert result.returncode == 0, result.stderr
    flags = flags_of(change(config, train={"steps": 2}))
    for _ in range(2):  # a split smaller than the devices needs a batch as small too
        result = run_module("facevae_jax.main", *flags, f"--workdir={tmp_path}", devices=8)
        if result.returncode == 0:
            break
        assert_one_line_error(result, "batch_size")
        assert "JAX_NUM_CPU_DEVICES" not in os.environ or "JAX_NUM_CPU_DEVICES" not in result.stderr
        flags += follow(result.stderr, monkeypatch)
    result = run_module("facevae_jax.main", *flags, f"--workdir={tmp_path}", devices=8)
    assert result.returncode == 0, result.stderr
