"""What 8 devices send each other in a step, read from the compiled program; and that a batch in parts is the batch."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from facevae_jax.config import RunConfig
from facevae_jax.data.batches import Chunk
from facevae_jax.training.communication import Collective, bytes_per_step, collectives
from facevae_jax.training.loop import train
from facevae_jax.training.sharding import make_mesh, replicated, split_along
from facevae_jax.training.state import abstract_state, make_model, make_optimizer
from facevae_jax.training.step import Trainer, compile_train_steps
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import change

FILTERS, LATENT_DIM, BATCH, RESOLUTION = (8, 16, 24), 5, 64, 32
STATISTICS = (8, 16, 24, 16, 8)  # channels of each normalisation: the encoder's three, the decoder's two


def program(*, feed, accumulation=1, convolution="matmul"):
    """The compiled steps as text, and the number of parameters."""
    config = RunConfig.from_config_dict(
        {
            "data": {"resolution": RESOLUTION, "flip": True, "dequantize": True},
            "model": {"filters": FILTERS, "latent_dim": LATENT_DIM, "dropout_rate": 0.1},
            "train": {"batch_size": BATCH, "convolution": convolution, "accumulation": accumulation},
        }
    )
    mesh, capacity = make_mesh(), 4
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=10))
    state = abstract_state(config, trainer.model, trainer.optimizer, mesh)
    image, part = (RESOLUTION, RESOLUTION, 3), BATCH // accumulation
    pixels = {
        "resident": jax.ShapeDtypeStruct((1000, *image), np.uint8, sharding=replicated(mesh)),
        "sharded": jax.ShapeDtypeStruct((1000, *image), np.uint8, sharding=split_along(mesh, 0)),
        "streamed": (jax.ShapeDtypeStruct((part, *image), np.uint8, sharding=split_along(mesh, 0)),)
        * (capacity * accumulation),
    }
    rows = jax.ShapeDtypeStruct((capacity * accumulation, part), np.int32, sharding=split_along(mesh, 1))
    compiled = compile_train_steps(trainer, state, Chunk(pixels[feed], rows), capacity=capacity)
    return compiled.as_text(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def expected(parameters, *, parts=1):
    """The exchanges of a step: the gradients once; statistics and means there, and their gradients back."""
    numbers = Counter({Collective("all-reduce", (("f32", (parameters,)),), 1): 1})
    for channels in STATISTICS:
        numbers[Collective("all-reduce", (("f32", (2, channels)),), parts)] += 2
    numbers[Collective("all-reduce", (("f32", (2 + LATENT_DIM,)),), parts)] += 2
    return numbers


@pytest.mark.parametrize(
    ("feed", "accumulation", "convolution"),
    [
        ("resident", 1, "matmul"),
        pytest.param("resident", 1, "plain", marks=pytest.mark.slow),
        pytest.param("streamed", 1, "matmul", marks=pytest.mark.slow),
        ("resident", 4, "matmul"),
    ],
)
def test_what_is_sent_in_a_step(feed, accumulation, convolution):
    text, parameters = program(feed=feed, accumulation=accumulation, convolution=convolution)
    assert Counter(collectives(text)) == expected(parameters, parts=accumulation)
    values = parameters + 2 * accumulation * (2 * sum(STATISTICS) + 2 + LATENT_DIM)
    assert bytes_per_step(text) == 4 * values


def test_a_sharded_split_sends_the_batch_beside_that():
    text, parameters = program(feed="sharded")
    extra = Counter(collectives(text)) - expected(parameters)
    assert {shape[0] for each in extra for shape in each.shapes} <= {"u8", "s32", "u32"}
    # The masked gather adds up the batch; a device gets its part of it or the whole.
    assert 0 < sum(each.bytes * each.times for each in extra.elements()) <= 2 * BATCH * RESOLUTION**2 * 3


def test_loops_of_known_length_are_counted():
    text = """
%body (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), to_apply=%add
}
%steps (p: f32[4]) -> f32[4] {
  %g = (bf16[3,2]{1,0}, pred[5]{0}) all-gather-start(%p), dimensions={0}
  %w = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%steps
}
"""
    found = collectives(text)
    assert [(each.kind, each.times, each.bytes) for each in found] == [("all-gather", 1, 17), ("all-reduce", 7, 16)]
    assert bytes_per_step(text) == 17 + 7 * 16


@pytest.mark.slow
def test_a_batch_in_parts_is_the_batch(tiny_config, tmp_path):
    """Without batch normalisation and dropout, which see the parts, 20 steps have the same losses."""
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
    """One step in two parts moves them as far as one step on the whole batch: the means to the same place."""
    moved = []
    for parts in (1, 2):
        config = change(tiny_config, train={"accumulation": parts, "steps": 1}, model={"dropout_rate": 0.0})
        state = train(config, tmp_path / str(parts))
        moved.append(state.batch_stats["encoder"]["Stage_0"]["BatchNorm_0"])
    np.testing.assert_allclose(moved[0]["mean"], moved[1]["mean"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved[0]["var"], moved[1]["var"], rtol=0.02)


def test_parts_that_do_not_divide_the_batch_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"config\.train\.accumulation=3 .* a divisor of config\.train\.batch_size=16"):
        dataclasses.replace(tiny_config.train, accumulation=3)
