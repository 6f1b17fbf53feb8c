"""Each alarm, provoked in a run of its own."""

import numpy as np
import pytest

from facevae_jax.training.alarms import Alarms, _mean_image_error
from facevae_jax.training.loop import train
from tests.conftest import change


def alarms(capsys) -> list[str]:
    return [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")]


@pytest.fixture(scope="module")
def fast(tiny_config):
    return change(tiny_config, train={"steps_per_dispatch": 64, "log_every_steps": 10})


def test_a_run_that_goes_well_has_none(fast, tmp_path, capsys):
    train(change(fast, objective={"r_loss_factor": 50_000.0}, train={"epochs": 8}), tmp_path)
    assert alarms(capsys) == []


def test_posterior_collapse_and_a_decoder_that_looks_at_no_latent(fast, tmp_path, capsys):
    # Without the batch's statistics, which lag behind in so short a run.
    model = {"normalization": "none", "dropout_rate": 0.0}
    train(change(fast, model=model, objective={"kl_weight": 100.0}, train={"epochs": 6}), tmp_path)
    said = alarms(capsys)
    assert said[-2].startswith("posterior collapse: 0 of 8 latent dimensions are active")
    assert "config.objective.kl_weight" in said[-2]
    assert said[-1].startswith("dead decoder: MSE 0.0")


def test_an_exploding_kl(fast, tmp_path, capsys):
    config = change(fast, objective={"kl_weight": 0.0}, train={"epochs": 4, "learning_rate": 0.3, "warmup_steps": 60})
    train(config, tmp_path)
    exploding = [line for line in alarms(capsys) if line.startswith("exploding KL")]
    assert exploding
    assert "config.train.learning_rate" in exploding[0]


def test_over_fitting(fast, tmp_path, capsys):
    config = change(
        fast,
        data={"synthetic_train_images": 16, "flip": False},
        model={"dropout_rate": 0.0, "normalization": "none", "filters": (32, 64)},
        objective={"r_loss_factor": 100_000.0, "kl_weight": 0.0},
        train={"epochs": 400, "evaluate_every_epochs": 40, "learning_rate": 3e-3},
    )
    train(config, tmp_path)
    found = [line for line in alarms(capsys) if line.startswith("over-fitting")]
    assert found
    assert "the best checkpoint is kept" in found[-1]


@pytest.mark.parametrize("baseline", [False, True])
def test_a_baseline_has_no_posterior_that_could_collapse_or_explode(baseline):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    watch, units = Alarms(images, latent_dim=8), {} if baseline else {"active_units": 0.0}
    said = [line for _ in range(2) for line in watch.look({"loss": 1.0, "mse": 0.01, "kl": 1e6, **units}, None)]
    assert any("collapse" in line for line in said) == any("exploding" in line for line in said) == (not baseline)


def test_the_mean_images_error_is_that_of_all_of_them():
    images = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3)).astype(np.uint8)
    expected = np.square(images / 255 - (images / 255).mean(axis=0)).mean()
    assert _mean_image_error(images) == pytest.approx(expected, rel=1e-9)


def test_one_image_alone_is_its_own_mean_which_is_no_dead_decoder():
    looked = Alarms(np.full((1, 4, 4, 3), 7, np.uint8), latent_dim=2)
    evaluation = {"loss": 1.0, "mse": 0.002, "kl": 3.0, "active_units": 2.0}
    assert looked.look(evaluation, 1.0) == looked.look(evaluation, 1.0) == []
