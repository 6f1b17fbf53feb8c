"""What must not be lost: odd names of workdirs, other numerics, parameters that are not finite, data prepared anew."""

import errno
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest

import facevae_jax
from facevae_jax.core import streams
from facevae_jax.core.errors import UserError, of_environment
from facevae_jax.data import dataset
from facevae_jax.data.dataset import Drawn
from facevae_jax.training import recovery
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainSetup, abstract_state, create_state, make_mesh
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import assert_same_trees, change


@pytest.fixture(scope="module")
def setup(tiny_config):
    return TrainSetup.of(tiny_config, make_mesh(), total_steps=20)


def restored(workdir, setup):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_newest(abstract_state(setup)).state


@pytest.mark.parametrize(
    "name", ["q[1]", "[a-z]/run", "a\\b", "x\\y/run", "a*b", "a?", "gs:/bucket", "end:", "b\udcff"]
)
def test_a_name_under_which_no_checkpoint_can_be_kept_is_refused_before_the_first_step(tiny_config, tmp_path, name):
    with pytest.raises(UserError, match="take another name"):
        train(tiny_config, tmp_path / name)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("name", ["a b", "ünï", "a:b", "%20#", "{x}", "'$HOME'", "a\nb", "日本"])
def test_under_other_names_a_state_is_kept(setup, tmp_path, name):
    state, workdir = create_state(setup), tmp_path / name
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, step=0, loss=1.0)
    recovery.check_name(workdir)
    assert_same_trees(restored(workdir, setup), state)


@pytest.mark.parametrize("name", ["q[1]", "[run]/of[2]", "a\\b"])
def test_a_run_that_was_kept_under_such_a_name_is_recovered(setup, tmp_path, name):
    """Written as versions did that did not refuse it."""
    state, workdir = create_state(setup), tmp_path / name
    workdir.mkdir(parents=True)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, step=0, loss=1.0)
    assert not (workdir / "checkpoints/0/state" / recovery.JOINED).exists()
    with pytest.raises(UserError, match="rename the folder"):
        recovery.check_name(workdir)
    workdir.rename(tmp_path / "renamed")
    recovery.complete(tmp_path / "renamed")
    assert_same_trees(restored(tmp_path / "renamed", setup), state)


def test_other_settings_of_jax_are_refused_from_python(workdir):
    for name, value in {"jax_enable_x64": True, "jax_default_prng_impl": "rbg", "jax_random_seed_offset": 3}.items():
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            with pytest.raises(UserError, match=name):
                facevae_jax.load(workdir)
        finally:
            jax.config.update(name, before)
    facevae_jax.load(workdir)


@pytest.mark.parametrize("field", ["params", "batch_stats"])
def test_parameters_that_are_not_finite_are_never_resumed_from(setup, finished, tmp_path, field, capsys):
    workdir, good = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    spoilt = jax.tree.map(lambda leaf: leaf.at[...].set(jnp.nan), getattr(good, field))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(good._replace(**{field: spoilt}), step=25, loss=float("nan"))
        checkpoints.wait()
        assert checkpoints.newest_finite() == 20
    assert facevae_jax.load(workdir).step in (10, 20)
    assert_same_trees(restored(workdir, setup), good)
    assert "not finite" in capsys.readouterr().out
    assert (workdir / "damaged_checkpoints").is_dir()


def test_a_score_that_is_not_finite_spoils_a_checkpoint_too(setup, tmp_path):
    state = create_state(setup)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, step=0, loss=None)
        checkpoints.save(state, step=1, loss=float("inf"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_finite() == 0


def test_a_run_is_not_resumed_on_other_images_unless_they_are_accepted(tiny_config, finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(Drawn, "fingerprint", property(lambda self: "drawn anew"))
    longer = change(tiny_config, train={"epochs": 3})
    before = sorted(workdir.rglob("checkpoints/*"))
    with pytest.raises(UserError, match="accept_new_data"):
        train(longer, workdir)
    assert sorted(workdir.rglob("checkpoints/*")) == before
    train(longer, workdir, accept_new_data=True)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 30  # the scores on other images count no more
    train(change(tiny_config, train={"epochs": 4}), workdir)  # accepted once and for all
    assert json.loads((workdir / "data.json").read_text())["sizes"] == {"train": 165, "validation": 37}


def test_scores_of_another_split_count_no_more(tiny_config, finished, tmp_path, monkeypatch):
    """As of a run of before, which was evaluated on a handful of validation images."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(dataset, "MIN_VALIDATION_IMAGES", 100)
    train(change(tiny_config, train={"epochs": 3}), workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.best_step() == 30
    assert [record["split"] for record in read_metrics(workdir) if record["kind"] == "evaluation"][-1] == "train"


@pytest.mark.slow
def test_a_run_that_diverges_as_it_resumes_ends_in_one_line_and_keeps_its_good_checkpoint(
    tiny_config, finished, tmp_path, capsys
):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    wild = change(tiny_config, train={"epochs": 9, "learning_rate": 1e6, "warmup_steps": 0})
    with pytest.raises(UserError, match=r"not finite.* the last good one is .*/20: lower"):
        train(wild, workdir)
    assert "alarm" not in capsys.readouterr().out  # the steps that are skipped tell
    assert facevae_jax.load(workdir).step == 20
    train(change(tiny_config, train={"epochs": 3}), workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert 30 in checkpoints.steps()


def test_a_stream_that_fails_loses_only_what_is_printed(tmp_path):
    with pathlib.Path("/dev/full").open("w", buffering=1) as full:
        stream = streams.Unbreakable(full)
        for _ in range(3):
            print("lost", file=stream, flush=True)
        assert not stream.isatty()
        streams.send_nowhere(full.fileno())  # what is still buffered
    path = tmp_path / "ascii"
    with path.open("w", encoding="ascii") as file:
        print("gr\u00fcn \udcff", file=streams.Unbreakable(file))
    assert path.read_text() == "gr\\xfcn \\udcff\n"
    closed = path.open()
    closed.close()
    streams.Unbreakable(closed).flush()


def test_errors_of_the_machine_are_one_line_and_others_are_not_hidden():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        assert "/x cannot be written (why)" in of_environment(OSError(number, "why", "/x"))
    assert "JAX_NUM_CPU_DEVICES" in of_environment(ValueError('Invalid value "x" for JAX flag jax_num_cpu_devices'))
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda: jnp.zeros(2**45))()
    assert "--batch_size" in of_environment(caught.value)
    for error in (OSError(2, "No such file", "/x"), ValueError("a bug"), RuntimeError("another")):
        assert of_environment(error) == ""
