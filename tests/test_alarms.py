"""Each alarm, by the figures of evaluations and, slowly, provoked in a run of its own."""

import numpy as np
import pytest

from facevae_jax.training.alarms import Alarms, _mean_image_error
from facevae_jax.training.loop import train
from tests.conftest import change

NOISE = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3)).astype(np.uint8)


def alarms_of(*evaluations, images=NOISE):
    """Names of the alarms of evaluations (loss, mse, kl, active units, training loss), with 8 latent dimensions."""
    alarms, found = Alarms(images), []
    for loss, mse, kl, active, training in evaluations:
        units = {} if active is None else {"active_units": active}
        found += alarms.check({"loss": loss, "mse": mse, "kl": kl, **units}, training, latent_units=8 if units else 0)
    return [line.partition(":")[0] for line in found]


GOOD = (10.0, 0.01, 20.0, 8, 10.0)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (GOOD, []),
        ((10.0, 0.01, 20.0, 0, 10.0), []),  # once is not yet a collapse
        ((10.0, 0.01, 1e4, 8, 10.0), ["exploding KL"]),
        ((10.0, 0.2, 20.0, 8, 10.0), []),  # nor a dead decoder
        ((11.0, 0.01, 20.0, 8, 5.0), ["over-fitting"]),
        ((11.0, 0.01, 20.0, 8, 10.5), []),  # worse in training too
    ],
)
def test_each_alarm_has_its_figures(after, expected):
    assert alarms_of(GOOD, after) == expected


def test_collapse_needs_two_evaluations_and_a_posterior():
    collapsed, baseline = (10.0, 0.01, 0.0, 0, 10.0), (10.0, 0.01, 1e6, None, 10.0)
    assert alarms_of(collapsed) == []
    assert alarms_of(collapsed, collapsed) == ["posterior collapse"]
    assert alarms_of(baseline, baseline) == []


def test_groups_are_dead_that_carry_nothing_in_four_evaluations():
    def lines(*rates):
        alarms, base = Alarms(NOISE), {"loss": 10.0, "mse": 0.01, "kl": 20.0, "active_units": 8}
        return [alarms.check(base | {"rates": list(now)}, 10.0, latent_units=8) for now in rates]

    idle, busy = (20.0, 0.0, 5.0, 0.009), (20.0, 0.02, 5.0, 0.009)
    found = lines(idle, idle, idle, idle, idle)
    assert [bool(line) for line in found] == [False, False, False, True, False]
    assert "2 of 4 groups" in found[3][0]
    assert "2, 4" in found[3][0]
    assert "1 of 4 groups" in lines(idle, idle, busy, idle)[3][0]  # the second carried something meanwhile
    assert not any(lines(*[(0.001,)] * 5))  # one group that carries nothing is a collapse


def test_a_decoder_is_dead_where_its_error_no_longer_falls():
    def errors(*values):
        return alarms_of(*((10.0, value, 20.0, 8, 10.0) for value in values))

    assert errors(0.2, 0.2, 0.2) == []
    assert errors(0.2, 0.2, 0.2, 0.2, 0.2) == ["dead decoder"]  # one line, not two
    assert errors(0.2, 0.197, 0.194, 0.191, 0.188) == []  # it falls
    assert errors(0.2, 0.2, 0.2, 0.2, 0.01, 0.2, 0.2, 0.2) == ["dead decoder"] * 2  # again after a good one


def test_nothing_is_judged_while_training_warms_up():
    alarms = Alarms(NOISE)
    bad = {"loss": 1e9, "mse": 0.5, "kl": 1e9, "active_units": 0}
    assert [alarms.check(bad, 1.0, latent_units=8, warming=True) for _ in range(6)] == [[]] * 6


def test_a_likelihood_around_zero_is_no_over_fitting():
    assert alarms_of((-5000.0, 0.01, 20.0, 8, -5000.0), (-1.0, 0.01, 20.0, 8, -5001.0)) == ["over-fitting"]
    assert alarms_of((5000.0, 0.01, 20.0, 8, 5000.0), (1.0, 0.01, 20.0, 8, 2.0), (1.5, 0.01, 20.0, 8, 0.5)) == []


def test_one_image_is_its_own_mean_and_no_dead_decoder():
    evaluation = (1.0, 0.002, 3.0, 8, 1.0)
    assert alarms_of(evaluation, evaluation, images=NOISE[:1]) == []


def test_the_error_of_the_mean_image_is_that_of_all_images():
    expected = np.square(NOISE / 255 - (NOISE / 255).mean(axis=0)).mean()
    assert _mean_image_error(NOISE) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"objective": {"r_loss_factor": 50_000.0}, "train": {"epochs": 8}}, set()),
        (
            {  # without the batch's statistics, which lag behind in so short a run
                "model": {"normalization": "none", "dropout_rate": 0.0},
                "objective": {"kl_weight": 100.0},
                "train": {"epochs": 6},
            },
            {"posterior collapse"},  # the error still falls: the decoder is not dead
        ),
        (
            {
                "objective": {"kl_weight": 0.0},
                "train": {"epochs": 6, "learning_rate": 0.3, "warmup_steps": 15},
            },
            {"exploding KL"},
        ),
        (
            {
                "data": {"synthetic_train_images": 16},
                "model": {"dropout_rate": 0.0, "normalization": "none", "filters": (32, 64)},
                "objective": {"r_loss_factor": 100_000.0, "kl_weight": 0.0},
                "train": {"epochs": 400, "evaluate_every_epochs": 40, "learning_rate": 3e-3},
            },
            {"over-fitting"},
        ),
    ],
    ids=["none", "collapse", "explosion", "over-fitting"],
)
def test_a_run_logs_its_alarms(tiny_config, tmp_path, capsys, sections, expected):
    base = change(tiny_config, train={"steps_per_dispatch": 64, "log_every_steps": 10})
    train(change(base, **sections), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")]
    found = {line.split(": ")[1] for line in lines}
    assert expected <= found
    assert bool(expected) == bool(found)


HEALTHY = {
    "paper": {},
    "wide, gaussian": {
        "model": {"latent_dim": 64, "filters": (16, 32, 64)},
        "objective": {"likelihood": "gaussian"},
    },
    "narrow, learned variance": {
        "model": {"latent_dim": 2},
        "objective": {"likelihood": "gaussian", "variance": "learned"},
    },
    "sharp": {"objective": {"r_loss_factor": 100_000.0}},
    "bits": {"objective": {"likelihood": "discretized_logistic"}},
    "warmed up, free bits, averaged": {
        "objective": {"kl_warmup_steps": 150, "free_bits": 0.5},
        "train": {"warmup_steps": 100, "schedule": "cosine", "ema_decay": 0.99},
    },
    "autoencoder": {"model": {"kind": "autoencoder"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_logs_no_alarm(tiny_config, tmp_path, capsys, sections):
    """256 steps on half a thousand faces, evaluated eight times."""
    base = change(
        tiny_config,
        data={"synthetic_train_images": 512, "synthetic_validation_images": 128, "flip": True},
        model={"dropout_rate": 0.0},
        train={"epochs": 8, "learning_rate": 2e-3, "warmup_steps": 50, "steps_per_dispatch": 64},
    )
    train(change(base, **sections), tmp_path)
    assert "alarm: " not in capsys.readouterr().out
