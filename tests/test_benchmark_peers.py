"""The comparison with other trainers: the same network, and a run that no peer can stop."""

import dataclasses
import sys
import types
from typing import Any

import pytest

from benchmarks.peers import client
from benchmarks.peers.case import Timing, calibrate, whole_epochs
from benchmarks.peers.client import Worker, WorkerError, worker_command
from benchmarks.peers.worker import PEERS
from benchmarks.suites import peers
from configs import gdl128
from facevae_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig

PAPER = RunConfig.from_config_dict(gdl128.get_config())
TINY = peers.peer_config(
    RunConfig(
        data=DataConfig(resolution=32),
        model=ModelConfig(latent_dim=4),
        train=TrainConfig(batch_size=8, steps_per_dispatch=3),
    )
)
TRAINABLE = 2_649_299  # as tests/test_vae.py counts ours


def dies(status: int) -> list[str]:
    return [sys.executable, "-c", f"import sys; print('first\\nout of luck', file=sys.stderr); sys.exit({status})"]


def test_torch_network_has_our_parameters():
    pytest.importorskip("torch")
    from benchmarks.peers import torch_vae

    assert torch_vae.trainable_parameters(torch_vae.make_network(PAPER)) == TRAINABLE


def test_keras_network_has_our_parameters():
    pytest.importorskip("keras")
    from benchmarks.peers import keras_vae

    assert keras_vae.trainable_parameters(keras_vae.VAE(PAPER)) == TRAINABLE


def test_peers_train_the_preset_without_dropout():
    assert TINY.model == dataclasses.replace(PAPER.model, latent_dim=4, dropout_rate=0.0)
    assert (TINY.data.resolution, TINY.train.batch_size, TINY.train.steps_per_dispatch) == (32, 8, 3)
    assert TINY.train.learning_rate == PAPER.train.learning_rate
    assert TINY.objective == PAPER.objective


@pytest.mark.parametrize(("steps", "expected"), [(1, (1, 1)), (20, (1, 20)), (32, (1, 32)), (90, (3, 32))])
def test_whole_epochs(steps, expected):
    assert whole_epochs(steps) == expected


def test_calibration_takes_longer_until_it_is_long_enough():
    asked = []

    def train(steps: int) -> Timing:
        asked.append(steps)
        return Timing(images=8 * steps, seconds=0.1 * steps)

    assert calibrate(train, batch_size=8, seconds=1.0) == pytest.approx(0.1)
    assert asked == [3, 1, 4, 16]


@pytest.mark.slow
def test_suite_reports_ours_and_a_dying_peer(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as on the machine that is measured
    monkeypatch.setattr(peers, "PEERS", {name: PEERS[name] for name in ("ours", "torch eager")})
    monkeypatch.setattr(
        client, "worker_command", lambda name, config: worker_command(name, config) if name == "ours" else dies(3)
    )
    record = peers.run(types.SimpleNamespace(config=TINY, rounds=2, seconds=0.1))
    assert record["skipped"] == {"torch eager": "ended with status 3: out of luck"}
    assert list(record["median"]) == ["ours"]
    assert len(record["all"]["ours"]) == 2
    assert all(rate > 0 for rate in record["all"]["ours"])
    assert record["ratio_to_best_torch"] is None
    assert record["ratio_to_best_torch_per_round"] is None
    assert record["peers"] == {}


@pytest.mark.parametrize(
    ("name", "reason"), [("nobody", "ended with status 2"), ("ours", "ValueError: config.data.resolution=33")]
)
def test_worker_that_fails_gives_its_reason(name, reason):
    config: Any = types.SimpleNamespace(to_dict=lambda: {"data": {"resolution": 33}})  # no RunConfig would accept it
    with pytest.raises(WorkerError, match=reason):
        Worker(worker_command(name, config), time_limit=60.0)


def test_worker_that_dies_later_gives_its_reason():
    ready = "print('{}', flush=True); input(); sys.exit('gone')"
    worker = Worker([sys.executable, "-c", f"import sys; {ready}"], time_limit=60.0)
    with pytest.raises(WorkerError, match="ended with status 1: gone"):
        worker.train(1, time_limit=60.0)


def test_worker_that_hangs_is_killed():
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        Worker([sys.executable, "-c", "import time; time.sleep(600)"], time_limit=1.0)


def test_ratios_compare_equal_precision():
    rates = {"ours": [4.0, 8.0], "torch eager": [2.0, 2.0], "torch compile bf16": [4.0, 4.0], "pythae": [1.0, 1.0]}
    ready = {name: {"versions": {name: "1"}, "device": "cpu", "parameters": 7} for name in rates}
    record = peers.summarise(TINY, rates, ready=ready, skipped={})
    assert record["best_torch"] == "torch eager"
    assert record["ratio_to_best_torch"] == 3.0
    assert record["ratio_to_best_torch_per_round"] == [2.0, 4.0]
    assert record["ratio_to_pythae"] == 6.0
    assert record["ratio_to_keras_fit"] is None
    assert "ours" not in record["peers"]
    half = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="bfloat16"))
    assert peers.summarise(half, rates, ready=ready, skipped={})["best_torch"] == "torch compile bf16"
