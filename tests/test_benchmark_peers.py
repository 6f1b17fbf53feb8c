"""The comparison with other trainers: the same network, and a run that no peer can stop."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers.case import Case, by_epochs
from benchmarks.peers.worker import PEERS, Peer, Worker, WorkerError
from benchmarks.suites import peers
from configs import gdl128
from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.exporting.published import vdvae_parameters
from facevae_jax.models import hierarchical, vae
from facevae_jax.objective import image_terms
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh, make_model
from tests.conftest import REPOSITORY

PAPER = RunConfig.from_config_dict(gdl128.get_config())
TINY = peers.peer_config(
    RunConfig(
        data=DataConfig(resolution=32),
        model=vae.Config(latent_dim=4),
        train=TrainConfig(batch_size=8, steps_per_dispatch=3),
    )
)
TRAINABLE = 2_649_299  # as tests/test_vae.py counts ours


def test_a_rotated_torch_network_is_ours():
    torch = pytest.importorskip("torch")
    from benchmarks import pythae_run
    from benchmarks.peers import torch_vae

    assert torch_vae.trainable_parameters(torch_vae.Network(PAPER)) == TRAINABLE
    config = pythae_run.evaluated_config("synthetic", 32)
    torch.manual_seed(0)
    network = torch_vae.Network(config)
    generator = np.random.default_rng(0)
    for module in network.modules():  # away from a new network's zeros and ones
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor += torch.from_numpy(generator.uniform(0, 0.2, tensor.shape)).float()
    network.eval()
    variables = jax.tree.map(jnp.asarray, pythae_run.converted(network))
    model, _ = make_model(config)
    images = generator.uniform(size=(3, 32, 32, 3)).astype(np.float32)
    codes = generator.normal(size=(3, 200)).astype(np.float32)
    rotated = np.ascontiguousarray(images[:, ::-1, ::-1].transpose(0, 3, 1, 2))
    with torch.no_grad():
        _, *expected = network(torch.from_numpy(rotated))
        decoded = network.decoder(torch.from_numpy(codes)).numpy().transpose(0, 2, 3, 1)[:, ::-1, ::-1]
    for found, wanted in zip(model.apply(variables, jnp.asarray(images), method="encode"), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert decoded.std() > 0.01
    np.testing.assert_allclose(model.apply(variables, jnp.asarray(codes), method="decode").mean, decoded, atol=1e-5)


@pytest.mark.parametrize("of_hazami", [False, True])
def test_torch_s_hierarchy_is_ours(of_hazami, monkeypatch):
    """The negative ELBO of both at the means of all groups, from the same weights."""
    torch = pytest.importorskip("torch")
    from benchmarks.peers import torch_hierarchy

    model = hierarchical.Config(
        encoder_blocks="32x1,32d2,16d4,4d4,1x1",
        decoder_blocks="1x1,4m1,4x1,16m4,32m16",
        width=12,
        widths="32:8",
        bottleneck_widths="16:5",
        latent_channels=3,
        **({"activation": "silu", "deviation": "softplus"} if of_hazami else {}),
    )
    objective = ObjectiveConfig(likelihood="color_logistic", mixture_components=2)
    config = RunConfig(data=DataConfig(resolution=32), model=model, objective=objective)
    torch.manual_seed(0)
    network = torch_hierarchy.Network(config)
    for parameter in network.parameters():  # away from a new network's zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    variables = jax.tree.map(jnp.asarray, {"params": vdvae_parameters(tensors, model)})
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    images[0, :2] = [[[0]], [[255]]]
    ours, likelihood = make_model(config)
    terms = image_terms(
        jnp.asarray(images / 255.0, jnp.float32),
        ours.apply(variables, jnp.asarray(images), None, train=False),
        likelihood,
    )
    expected = np.mean(terms.pixels.nll + sum(kl.reshape(2, -1).sum(axis=1) for kl in terms.kl))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with torch.no_grad():
        found = network.negative_elbo(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_keras_network_has_our_parameters():
    from benchmarks.peers import keras_vae

    assert sum(math.prod(variable.shape) for variable in keras_vae.VAE(PAPER).trainable_variables) == TRAINABLE


def test_peers_train_the_preset_without_dropout():
    assert TINY.model == dataclasses.replace(PAPER.model, latent_dim=4, dropout_rate=0.0)
    assert (TINY.data.resolution, TINY.train.batch_size, TINY.train.steps_per_dispatch) == (32, 8, 3)
    assert TINY.train.learning_rate == PAPER.train.learning_rate
    assert TINY.objective == PAPER.objective


@pytest.mark.parametrize("steps", [1, 20, 32, 90])
def test_seconds_of_whole_epochs_are_those_of_the_steps_asked_for(steps):
    assert by_epochs(lambda epochs, steps_each: 0.5 * epochs * steps_each)(steps) == pytest.approx(0.5 * steps)


def make_case(config: RunConfig, variant: str) -> Case:
    """A peer that fails as `variant` says, in a process that imports this module."""

    def train(steps: int) -> float:
        if variant == "hang":
            time.sleep(600)
        if steps > 100:
            os._exit(3)
        return float(steps)

    if variant == "fail":
        raise RuntimeError("out of luck")
    return Case(train, 7, "cpu", {"a": "1"})


@pytest.mark.slow
def test_a_worker_that_hangs_is_given_up():
    with pytest.raises(WorkerError, match="within 20 s"):
        Worker(Peer(__name__, "hang"), TINY, time_limit=20.0)


@pytest.mark.slow
def test_a_worker_that_dies_later_gives_its_reason():
    worker = Worker(Peer(__name__), TINY, time_limit=300.0)
    assert worker.ready == {"seconds_per_step": 1.0, "parameters": 7, "device": "cpu", "versions": {"a": "1"}}
    assert worker.train(2, time_limit=300.0) == 2
    with pytest.raises(WorkerError, match="died"):
        worker.train(101, time_limit=300.0)


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed():
    """Otherwise it holds the parent's standard output open, and a reader of that waits forever."""
    code = """
import os, signal
from benchmarks.peers.worker import Peer, Worker
from tests import test_benchmark_peers
worker = Worker(Peer("tests.test_benchmark_peers"), test_benchmark_peers.TINY, time_limit=300.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=120)
    assert result.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_suite_reports_ours_and_a_dying_peer(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the machine that is measured has no virtual devices
    # XLA ends a process in which one device waits a minute for another, as happened beside other tests on two cores.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setattr(peers, "PEERS", {"ours": PEERS["ours"], "torch eager": Peer(__name__, "fail")})
    record = peers.run(types.SimpleNamespace(config=TINY, rounds=2, seconds=0.1))
    assert record["skipped"] == {"torch eager": "RuntimeError: out of luck"}
    assert list(record["median"]) == ["ours"]
    assert len(record["all"]["ours"]) == 2
    parameters = abstract_state(TrainSetup.of(TINY, make_mesh())).params
    assert record["trainable_parameters"] == {"ours": sum(leaf.size for leaf in jax.tree.leaves(parameters))}
