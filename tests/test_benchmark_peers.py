"""The comparison with other trainers: the same network, and a run that no peer can stop."""

import dataclasses
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.peers import client
from benchmarks.peers.case import Timing, calibrate, whole_epochs
from benchmarks.peers.client import Worker, WorkerError, worker_command
from benchmarks.peers.worker import PEERS
from benchmarks.suites import peers
from configs import gdl128
from facevae_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from facevae_jax.training.state import make_model

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


def test_a_torch_network_turned_round_is_ours():
    torch = pytest.importorskip("torch")
    from benchmarks import pythae_run
    from benchmarks.peers import torch_vae

    config = pythae_run.evaluated_config("synthetic", 32)
    torch.manual_seed(0)
    network = torch_vae.make_network(config)
    generator = np.random.default_rng(0)
    for module in network.modules():  # away from a new network's zeros and ones
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor += torch.from_numpy(generator.uniform(0, 0.2, tensor.shape)).float()
    network.eval()
    variables = jax.tree.map(np.asarray, pythae_run.converted(network))
    model = make_model(config)
    images = generator.uniform(size=(3, 32, 32, 3)).astype(np.float32)
    latents = generator.normal(size=(3, 200)).astype(np.float32)
    turned = np.ascontiguousarray(images[:, ::-1, ::-1].transpose(0, 3, 1, 2))
    with torch.no_grad():
        x = network.encoder(torch.from_numpy(turned))
        expected = [part.numpy() for part in (network.mean(x), network.log_variance(x))]
        decoded = network.decoder(torch.from_numpy(latents)).numpy().transpose(0, 2, 3, 1)[:, ::-1, ::-1]
    posterior = model.apply(variables, images, method="encode")
    for found, wanted in zip(posterior, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert decoded.std() > 0.01
    np.testing.assert_allclose(model.apply(variables, latents, method="decode"), decoded, atol=1e-5)


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
