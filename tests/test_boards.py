"""Curves and pictures beside `metrics.jsonl`: TensorBoard's files, and Weights & Biases without a connection."""

import struct

import numpy as np
import optax
import pytest
from PIL import Image

from facevae_jax.training import boards
from facevae_jax.training.loop import train
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import assert_one_line_error, change, flags_of, messages, run_module


def test_the_record_has_epochs(finished):
    """20 steps are two epochs."""
    assert [(record["step"], record["epoch"]) for record in read_metrics(finished[0])] == [
        (step, step / 10) for step in sorted([*range(1, 21), 10, 20])
    ]


def events_of(folder):
    """The events of TensorBoard's files: a length of 8 bytes, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            size = 12 + struct.unpack("<Q", data[:8])[0]
            yield Event.FromString(data[12:size])
            data = data[size + 4 :]


@pytest.mark.slow
def test_tensorboard_shows_the_learning_rate_and_the_pictures(tiny_config, tmp_path):
    train(
        change(tiny_config, train={"epochs": 1, "tensorboard": True, "schedule": "cosine", "warmup_steps": 4}), tmp_path
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, tiny_config.train.learning_rate, warmup_steps=4, decay_steps=10)
    shown = [(event.step, value) for event in events_of(tmp_path / "tensorboard") for value in event.summary.value]
    rates = {step: value.simple_value for step, value in shown if value.tag == "train/learning_rate"}
    assert rates == pytest.approx({step: float(rate(step - 1)) for step in range(1, 11)})
    pictures = {(step, value.tag) for step, value in shown if value.image.encoded_image_string}
    assert pictures == {(10, path.name.removesuffix("_00000010.png")) for path in (tmp_path / "pictures").iterdir()}


@pytest.mark.slow
def test_weights_and_biases_keeps_one_record_of_a_run_that_resumes(tiny_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epochs in (1, 2):
        flags = flags_of(tiny_config, train={"epochs": epochs, "wandb": True})
        result = run_module("facevae_jax.main", *flags, f"--workdir={tmp_path}")
        assert (result.returncode, messages(result)) == (0, []), result.stderr
    folder = tmp_path / "wandb"
    records = sorted(folder.glob("offline-run-*/*.wandb"))
    assert [path.name for path in records] == [f"run-{(folder / 'id').read_text()}.wandb"] * 2
    for step, record in zip((10, 20), records, strict=True):
        assert record.read_bytes().count(b"train/learning_rate") >= 10
        (kept,) = record.parent.glob(f"files/media/images/reconstructions_{step}_*.png")
        own = tmp_path / "pictures" / f"reconstructions_{step:08d}.png"
        np.testing.assert_array_equal(Image.open(kept), Image.open(own))


def test_a_run_has_the_project_of_the_environment_and_a_new_start_a_new_identity(tiny_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given))
    for first_step in (0, 5, 0):
        boards.WeightsAndBiases(tiny_config, tmp_path, first_step)
    first, resumed, other = (given["id"] for given in asked)
    assert first == resumed != other
    assert {given["project"] for given in asked} == {"mine"}


@pytest.mark.slow
@pytest.mark.parametrize("variable", [("WANDB_API_KEY", "not a key"), ("WANDB_MODE", "fo")], ids=lambda pair: pair[0])
def test_a_run_without_an_account_says_what_to_do(tiny_config, tmp_path, monkeypatch, variable):
    pytest.importorskip("wandb")
    monkeypatch.setenv(*variable)
    result = run_module("facevae_jax.main", *flags_of(tiny_config, train={"wandb": True}), f"--workdir={tmp_path}")
    assert_one_line_error(result, "config.train.wandb", "WANDB_MODE=offline")
