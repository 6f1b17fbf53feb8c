"""What 8 devices exchange in a step, read from the compiled program; and that a batch in parts is the batch."""

import contextlib
import math
import re

import jax
import numpy as np
import pytest

from facevae_jax.config import RunConfig
from facevae_jax.training.feeds import make_feed
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from facevae_jax.training.step import compile_train_steps
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import change

LATENT_DIM, BATCH, RESOLUTION = 5, 64, 32
SMALL = 100  # values: more than any batch statistic or mean of this model has, fewer than its gradients
EXCHANGE = re.compile(
    r"= (?P<shapes>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def program(*, feed, accumulation=1, convolution="matmul"):
    """The compiled steps as text, and the number of parameters."""
    config = RunConfig.from_config_dict(
        {
            "data": {"resolution": RESOLUTION, "flip": True, "dequantize": True, "feed": feed},
            "model": {"filters": (8, 16, 24), "latent_dim": LATENT_DIM, "dropout_rate": 0.1},
            "train": {
                "batch_size": BATCH,
                "convolution": convolution,
                "accumulation": accumulation,
                "steps_per_dispatch": 4,
            },
        }
    )
    mesh = make_mesh()
    setup = TrainSetup.of(config, mesh)
    state = abstract_state(setup)
    images = np.zeros((1000, RESOLUTION, RESOLUTION, 3), np.uint8)
    with contextlib.closing(make_feed(config, images, mesh, first_step=0)) as made:
        compiled = compile_train_steps(setup, state, made.spec)
    return compiled.as_text(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def exchanges(text):
    """(kind, element type, number of values) of every array that devices exchange."""
    return [
        (found["kind"], dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for found in EXCHANGE.finditer(text)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", found["shapes"])
    ]


def computations(text):
    """The program's text by computation (function)."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(
    ("feed", "accumulation", "convolution"),
    [
        ("resident", 1, "matmul"),
        pytest.param("resident", 1, "plain", marks=pytest.mark.slow),
        pytest.param("streamed", 1, "matmul", marks=pytest.mark.slow),
        ("resident", 4, "matmul"),
    ],
)
def test_a_step_exchanges_the_gradients_once_and_little_else(feed, accumulation, convolution):
    text, parameters = program(feed=feed, accumulation=accumulation, convolution=convolution)
    found = exchanges(text)
    assert [each for each in found if each[2] > SMALL] == [("all-reduce", "f32", parameters)]
    # No exchange is of images or their parts, whatever their type.
    assert {(kind, dtype) for kind, dtype, _ in found} == {("all-reduce", "f32")}
    if accumulation > 1:  # after the loop over the batch's parts, not in it
        functions = computations(text)
        loops = re.findall(rf'body=%?([\w.\-]+).*"known_trip_count":{{"n":"{accumulation}"}}', text)
        inside = [each for name in loops for each in exchanges(functions[name])]
        assert inside
        assert all(size <= SMALL for _, _, size in inside)


@pytest.mark.slow
def test_a_sharded_split_sends_the_batch_as_uint8():
    text, parameters = program(feed="sharded")
    pixels = [each for each in exchanges(text) if each[1] != "f32"]
    assert {dtype for _, dtype, _ in pixels} <= {"u8", "s32", "u32"}
    # The masked gather adds up the batch; a device gets its part of it or the whole.
    assert 0 < sum(size for _, dtype, size in pixels if dtype == "u8") <= 2 * BATCH * RESOLUTION**2 * 3
    assert [each for each in exchanges(text) if each[1] == "f32" and each[2] > SMALL] == [
        ("all-reduce", "f32", parameters)
    ]


@pytest.mark.slow
def test_a_batch_in_parts_is_the_batch(tiny_config, tmp_path):
    """Without batch normalization and dropout, which see the parts, 20 steps have the same losses."""
    config = change(
        tiny_config,
        model={"normalization": "group", "dropout_rate": 0.0},
        data={"flip": True, "dequantize": True},
        train={"warmup_steps": 20, "learning_rate": 2e-3},
    )
    losses = []
    for parts, feed in ((1, "resident"), (2, "streamed")):
        workdir = tmp_path / str(parts)
        train(change(config, train={"accumulation": parts}, data={"feed": feed}), workdir)
        losses.append([r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"])
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_the_running_statistics_of_parts_are_their_mean(tiny_config, tmp_path):
    """One step in two parts moves the means as far as one step on the whole batch."""
    moved = []
    for parts in (1, 2):
        config = change(tiny_config, train={"accumulation": parts, "steps": 1}, model={"dropout_rate": 0.0})
        state = train(config, tmp_path / str(parts))
        moved.append(state.batch_stats["encoder"]["Stage_0"]["BatchNorm_0"])
    np.testing.assert_allclose(moved[0]["mean"], moved[1]["mean"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved[0]["var"], moved[1]["var"], rtol=0.02)
