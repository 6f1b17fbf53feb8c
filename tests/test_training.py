import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facevae_jax.config import TrainConfig
from facevae_jax.data.pixels import open_splits
from facevae_jax.errors import UserError
from facevae_jax.models.vae import to_unit
from facevae_jax.objective import gaussian_kl
from facevae_jax.random import named_key
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.feeds import choose_feed
from facevae_jax.training.loop import train
from facevae_jax.training.restore import restore_model
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import create_state, make_model, make_optimizer, make_schedule
from facevae_jax.training.step import Trainer, estimate_variance
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import change, run_module


def assert_same_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A run of 20 steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(tiny_config, workdir)


def test_a_run_leaves_what_it_promises(finished, tiny_config):
    workdir, state = finished
    assert int(state.step) == 20
    assert json.loads((workdir / "config.json").read_text())["model"]["latent_dim"] == 8
    pictures = {path.name for path in (workdir / "pictures").iterdir()}
    for step in (10, 20):
        for name in ("reconstructions", "samples_standard", "samples_gaussian"):
            assert f"{name}_{step:08d}.png" in pictures
    records = read_metrics(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 21))
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [10, 20]
    assert all(r["split"] == "validation" for r in records if r["kind"] == "evaluation")
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stop", [7, 10])
def test_stopping_and_resuming_changes_no_bit(finished, tiny_config, tmp_path, stop):
    workdir, expected = finished
    interrupted = train(tiny_config, tmp_path, should_stop=lambda step: step >= stop)
    assert stop <= int(interrupted.step) < 20
    resumed = train(tiny_config, tmp_path)
    assert_same_trees(resumed, expected)

    def losses(directory):
        return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(directory)]

    assert losses(tmp_path) == losses(workdir)


@pytest.mark.parametrize("feed", ["sharded", "streamed"])
def test_other_feeds_and_dispatch_lengths_change_no_bit(finished, tiny_config, tmp_path, feed):
    _, expected = finished
    config = change(tiny_config, data={"feed": feed}, train={"steps_per_dispatch": 7, "log_every_steps": 50})
    assert_same_trees(train(config, tmp_path), expected)


@pytest.mark.slow
def test_augmented_runs_resume_exactly(tiny_config, tmp_path, finished):
    config = change(tiny_config, data={"flip": True, "dequantize": True})
    expected = train(config, tmp_path / "a")
    assert not np.array_equal(jax.tree.leaves(expected.params)[0], jax.tree.leaves(finished[1].params)[0])
    train(config, tmp_path / "b", should_stop=lambda step: step >= 7)
    resumed = train(change(config, data={"feed": "streamed"}), tmp_path / "b")
    assert_same_trees(resumed, expected)
    evaluations = [record for record in read_metrics(tmp_path / "a") if record["kind"] == "evaluation"]
    for record in evaluations:
        # The density of whole numbers 0 to 255 is that of the unit interval divided by 256 per pixel value.
        nats = record["negative_elbo"] + 32 * 32 * 3 * math.log(256)
        assert record["bits_per_dim"] == pytest.approx(nats / (32 * 32 * 3) / math.log(2))
    assert not any("bits_per_dim" in record for record in read_metrics(finished[0]))


@pytest.mark.parametrize(
    ("budget", "devices", "kind"),
    [(800, 1, "resident"), (799, 1, "streamed"), (100, 8, "sharded"), (99, 8, "streamed")],
)
def test_the_feed_is_the_fastest_that_fits(budget, devices, kind):
    chosen, reason = choose_feed(800 * 2**20, budget=budget * 2**20, devices=devices)
    assert chosen == kind
    assert f"800 MiB, {budget} MiB a device" in reason


def test_a_forced_feed_is_logged_with_the_choice_it_overrides(tiny_config, tmp_path, capsys):
    train(change(tiny_config, data={"feed": "sharded"}, train={"steps": 1}), tmp_path)
    assert (
        "feed: sharded; 165 images: as config.data.feed says, though resident would be chosen"
        in capsys.readouterr().out
    )


def test_a_finished_run_is_not_trained_further(finished, tiny_config):
    workdir, expected = finished
    before = read_metrics(workdir)
    assert_same_trees(train(tiny_config, workdir), expected)
    assert read_metrics(workdir) == before


def test_more_epochs_go_on_where_the_run_ended(tiny_config, tmp_path):
    longer = change(tiny_config, train={"epochs": 2})
    shorter = change(tiny_config, train={"epochs": 1})
    assert int(train(shorter, tmp_path / "a").step) == 10
    assert_same_trees(train(longer, tmp_path / "a"), train(longer, tmp_path / "b"))


def test_one_and_eight_devices_have_the_same_losses(tiny_config, tmp_path):
    """By the user's command; the losses of 20 steps agree to 1e-5.

    The warm-up is long: sums in another order differ by rounding, which Adam multiplies by its rate. At 5e-3 from the
    20th step on, a processor without AVX-512 had 8e-6 at step 19 and 1.2e-4 after step 20.
    """
    losses = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        result = run_module(
            "facevae_jax.main",
            "--config=configs/quickstart.py",
            f"--workdir={workdir}",
            f"--config.data.data_dir={tiny_config.data.data_dir}",
            "--config.data.resolution=32",
            "--config.data.synthetic_train_images=165",
            "--config.data.synthetic_validation_images=37",
            "--config.model.filters=(8,16)",
            "--config.model.dropout_rate=0.1",
            "--config.train.batch_size=16",
            "--config.train.steps=20",
            "--config.train.learning_rate=5e-3",
            "--config.train.schedule=constant",
            "--config.train.warmup_steps=100",
            "--config.train.evaluate_every_epochs=1",
            "--config.train.log_every_steps=1",
            devices=devices,
        )
        assert result.returncode == 0, result.stderr
        assert f"devices: {devices} x cpu" in result.stdout
        losses.append([r["loss"] for r in read_metrics(workdir)])
    assert len(losses[0]) == 20 + 2
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_evaluation_is_exact_for_a_ragged_split(finished, tiny_config):
    """37 images in batches of 16 score the same as image by image, computed here independently."""
    _, state = finished
    images = open_splits(tiny_config.data).evaluation
    mesh = make_mesh()
    trainer = Trainer(tiny_config, make_model(tiny_config), make_optimizer(tiny_config.train, total_steps=1))
    loss, moments, active_units = Evaluator(trainer, images, mesh)(state)

    posterior = trainer.model.apply(state.evaluation_variables, to_unit(images), method="encode")
    variance = np.exp(posterior.log_variance)
    np.testing.assert_allclose(loss.kl, np.sum(gaussian_kl(posterior), axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(moments.mean, posterior.mean.mean(axis=0), rtol=1e-4, atol=1e-5)
    expected = np.cov(posterior.mean.T, bias=True) + np.diag(variance.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-3, atol=1e-5)
    assert int(active_units) == np.sum(posterior.mean.var(axis=0) > 0.01) > 0

    errors = []
    for number, start in enumerate(range(0, 37, 16)):
        # The draws of z are those of the padded batch.
        key = jax.random.fold_in(named_key(tiny_config.train.seed, "evaluate"), number)
        count = min(16, 37 - start)
        eps = jax.random.normal(key, (16, 8))[:count]
        mean, log_variance = (part[start : start + count] for part in posterior)
        decoded = trainer.model.apply(
            state.evaluation_variables, mean + jnp.exp(0.5 * log_variance) * eps, method="decode"
        )
        errors.append(np.square(decoded - to_unit(images[start : start + count])).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(loss.mse, np.concatenate(errors).mean(), rtol=1e-5)


def test_latest_two_and_best_one_checkpoints_are_kept(tiny_config, tmp_path):
    trainer = Trainer(tiny_config, make_model(tiny_config), make_optimizer(tiny_config.train, total_steps=1))
    state = create_state(tiny_config, trainer.model, trainer.optimizer, make_mesh())
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in [(1, 5.0), (2, 1.0), (3, 2.0), (4, None), (5, 3.0), (6, 4.0)]:
            checkpoints.save(state, step=step, loss=loss)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 5, 6]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([6, 5, 2], 2)


def test_averaged_parameters_are_the_exponential_mean_and_are_what_is_used(tiny_config, tmp_path):
    config = change(tiny_config, train={"ema_decay": 0.5, "steps": 3, "checkpoint_every_steps": 1})
    history = []
    for stop in (1, 2, 3):
        state = train(config, tmp_path, should_stop=lambda step, stop=stop: step >= stop)
        history.append(jax.device_get({"params": state.params, "batch_stats": state.batch_stats}))
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=3))
    start = create_state(config, trainer.model, trainer.optimizer, make_mesh())
    average = jax.device_get({"params": start.params, "batch_stats": start.batch_stats})
    for decay, variables in zip((1 / 10, 2 / 11, 3 / 12), history, strict=True):  # below ema_decay to begin with
        average = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.averaged, average)
    assert_same_trees(restore_model(tmp_path).variables, state.averaged)


@pytest.mark.parametrize("normalization", ["group", pytest.param("none", marks=pytest.mark.slow)])
def test_models_without_batch_statistics_resume_and_restore(tiny_config, tmp_path, normalization):
    config = change(tiny_config, model={"normalization": normalization}, train={"steps": 6})
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", should_stop=lambda step: step >= 3)
    assert_same_trees(train(config, tmp_path / "parts"), whole)
    assert_same_trees(restore_model(tmp_path / "parts").variables["params"], whole.params)


def test_a_checkpoint_written_while_training_went_on_resumes_exactly(finished, tiny_config, tmp_path):
    workdir, state = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")  # step 10 was saved in the background, its state donated
    assert_same_trees(train(tiny_config, tmp_path / "run"), state)


def test_a_loss_that_is_not_finite_is_never_the_best(tiny_config, tmp_path):
    trainer = Trainer(tiny_config, make_model(tiny_config), make_optimizer(tiny_config.train, total_steps=1))
    state = create_state(tiny_config, trainer.model, trainer.optimizer, make_mesh())
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in enumerate([10.0, 8.0, math.nan, math.inf, math.nan], start=1):
            checkpoints.save(state, step=step, loss=loss)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.steps()[0]) == (2, 5)


def test_learning_rate_rises_and_falls_as_configured():
    cosine = make_schedule(TrainConfig(learning_rate=2.0, schedule="cosine", warmup_steps=10), total_steps=110)
    np.testing.assert_allclose([cosine(step) for step in (0, 5, 10, 60, 110)], [0.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)
    constant = make_schedule(TrainConfig(learning_rate=2.0, warmup_steps=4), total_steps=9)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 4, 9)], [0.0, 0.5, 2.0, 2.0], rtol=1e-6)
    assert make_schedule(TrainConfig(learning_rate=2.0, warmup_steps=0), total_steps=9)(0) == 2.0


def test_clipping_limits_the_first_moment():
    gradients = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0)}  # of norm 10
    optimizer = make_optimizer(TrainConfig(clip_norm=1.0), total_steps=1)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.size(leaf) == 4]
    np.testing.assert_allclose(sorted(float(leaf[0]) for leaf in moments)[-2:], [0.1 * 0.3, 0.1 * 0.4], rtol=1e-5)


@pytest.mark.parametrize("variance", ["optimal", pytest.param("learned", marks=pytest.mark.slow)])
def test_calibrated_likelihoods_train_and_report_their_variance(tiny_config, tmp_path, variance):
    settings = {"likelihood": "gaussian", "variance": variance, "kl_warmup_steps": 5}
    config = change(tiny_config, objective=settings)
    train(config, tmp_path)
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert records[-1]["loss"] < records[0]["loss"]
    for record in records:
        if variance == "optimal":
            assert record["variance"] == pytest.approx(record["mse"], rel=1e-6)
        assert record["equivalent_r_loss_factor"] == pytest.approx(3072 / (2 * record["variance"]), rel=1e-5)
    if variance == "learned":
        first = records[0]
        assert first["variance"] == pytest.approx(0.05)
        # It moves towards the mean squared error, its optimum, from the first step.
        assert (records[1]["variance"] - first["variance"]) * (first["mse"] - first["variance"]) > 0
    restore_model(tmp_path)


def test_optimal_variance_has_the_gradient_of_the_log_error(tiny_config):
    """Rybkin et al. 2021: with the optimal variance the likelihood is D/2 log(mse) up to a constant."""
    config = change(tiny_config, objective={"likelihood": "gaussian"})
    trainer = Trainer(config, make_model(config), make_optimizer(config.train, total_steps=1))
    dimensions = trainer.dimensions

    def nll(mse):
        variance = estimate_variance(mse, {}, trainer)
        return 0.5 * dimensions * (jnp.log(2 * jnp.pi * variance) + mse / variance)

    np.testing.assert_allclose(jax.grad(nll)(0.03), 0.5 * dimensions / 0.03, rtol=1e-5)


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        ("model", {"latent_dim": 9}, r"config\.model\.latent_dim was 8 and is now 9"),
        ("model", {"filters": (8, 8)}, r"config\.model\.filters was \[8, 16\] and is now \[8, 8\]"),
        ("data", {"resolution": 64}, r"config\.data\.resolution was 32 and is now 64"),
        ("objective", {"likelihood": "gaussian"}, r"config\.objective\.likelihood was 'mse'"),
        ("objective", {"kl_weight": 4.0}, r"config\.objective\.kl_weight was 1\.0 and is now 4\.0"),
        ("train", {"batch_size": 8}, r"config\.train\.batch_size was 16 and is now 8"),
        ("train", {"ema_decay": 0.9}, r"config\.train\.ema_decay was 0\.0 and is now 0\.9"),
    ],
)
def test_another_model_in_the_same_workdir_is_refused(finished, tiny_config, section, setting, message):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=message):
        train(change(tiny_config, **{section: setting}), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_batches_that_devices_cannot_share_are_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"config\.train\.batch_size=20 is not divisible by the 8 devices.*=16"):
        train(change(tiny_config, train={"batch_size": 20}), tmp_path)
    with pytest.raises(UserError, match=r"config\.train\.batch_size=176 is more than the 165 training images.*=160"):
        train(change(tiny_config, train={"batch_size": 176}), tmp_path)


def test_fewer_images_than_devices_are_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"more than the 5 training images: 8 devices need at least as many\."):
        train(change(tiny_config, data={"synthetic_train_images": 5}), tmp_path)


def test_settings_of_an_attempt_that_failed_may_change(tiny_config, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(change(tiny_config, data={"name": "nowhere"}), tmp_path)
    train(change(tiny_config, train={"steps": 1}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["name"] == "synthetic"
