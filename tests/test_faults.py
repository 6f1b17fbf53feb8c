"""What may go wrong in one process: damage, a second run, numbers that are not finite, silence."""

import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import facevae_jax
from facevae_jax.config import TrainConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.batches import Batch
from facevae_jax.objective import Loss
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.checksums import checksums
from facevae_jax.training.loop import train
from facevae_jax.training.pace import MAX_UNLEARNED_STEPS, Skips
from facevae_jax.training.setup import RunningMean, TrainSetup, abstract_state, create_state, make_mesh
from facevae_jax.training.step import Metrics, train_step
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import (
    REPOSITORY,
    assert_one_line_error,
    assert_same_trees,
    change,
    flags_of,
    losses_of,
    messages,
    run_module,
)

# Orbax leaves the futures of reads that failed to the garbage collector, which complains of each.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _collected():
    """Collects them before the test ends, so that no later test is blamed."""
    yield
    gc.collect()


def files_of(workdir, step):
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def damages(path):
    """Ways to damage a file: {name: function}."""
    size = path.stat().st_size

    def flip(position):
        content = bytearray(path.read_bytes())
        content[position] ^= 1 << (position % 8)
        path.write_bytes(content)

    found = {"missing": path.unlink, "empty": lambda: path.write_bytes(b"")}
    found["truncated"] = lambda: os.truncate(path, size // 2)
    for position in np.random.default_rng(size).integers(size, size=3):
        found[f"flipped at {position} of {size}"] = lambda position=position: flip(position)
    return found


def restore(workdir, config):
    """The state that a run would resume from."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_newest(abstract_state(TrainSetup.of(config, make_mesh()))).state


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_no_run_resumes_from_a_wrong_bit_whatever_is_damaged(finished, tiny_config, tmp_path, stride, capsys):
    """Every file of the newest checkpoint: missing, empty, cut short or with a flipped bit (by default every 4th)."""
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "checkpoints" / "20")
    expected = {20: restore(workdir, tiny_config), 10: restore(tmp_path / "before", tiny_config)}
    copy, restored = tmp_path / "run", []
    number = len(files_of(workdir, 20))
    assert number >= 5
    for index in range(number):
        for way in list(damages(files_of(workdir, 20)[index]))[index % stride :: stride]:
            shutil.copytree(workdir, copy)
            damages(files_of(copy, 20)[index])[way]()
            state = restore(copy, tiny_config)
            restored.append(int(state.step))
            assert_same_trees(state, expected[int(state.step)])
            aside = [path.name for path in copy.glob("damaged_checkpoints/*")]
            assert capsys.readouterr().out.count("warning: ") == len(aside)
            assert aside in ([["20-0"]] if int(state.step) == 10 else [[], ["20-score-0"]])
            shutil.rmtree(copy)
    assert restored.count(10) > number // stride  # what holds the arrays at least


def test_a_flipped_bit_of_the_arrays_is_logged_and_the_checkpoint_before_is_used(
    finished, tiny_config, tmp_path, capsys
):
    shutil.copytree(finished[0], tmp_path / "run")
    data = max(files_of(tmp_path / "run", 20), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    # Step 10 was saved in the background, while its state was donated to the next dispatch.
    assert_same_trees(train(tiny_config, tmp_path / "run"), finished[1])
    said = capsys.readouterr().out
    assert "checkpoints/20 " in said
    assert "resuming from step 10" in said
    assert losses_of(tmp_path / "run") == losses_of(finished[0])


def test_where_every_checkpoint_is_damaged_nothing_is_moved(finished, tiny_config, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for step in (10, 20):
        for path in files_of(tmp_path / "run", step):
            if "state" in path.parts:
                os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoints/20 cannot be restored.*no other checkpoint is whole"):
        train(tiny_config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "20"]


@pytest.mark.slow
def test_damage_gives_no_traceback(tiny_config, tmp_path):
    """By the user's commands: training resumes from the one before; sampling takes the next best."""
    arguments = [*flags_of(tiny_config), f"--workdir={tmp_path / 'run'}"]
    assert run_module("facevae_jax.main", *arguments).returncode == 0
    for path in files_of(tmp_path / "run", 20):
        if "state" in path.parts:
            os.truncate(path, path.stat().st_size // 2)
    sampled = run_module(
        "facevae_jax.generate",
        "sample",
        "--prior=gaussian",
        f"--workdir={tmp_path / 'run'}",
        f"--output={tmp_path}/x.png",
    )
    assert (sampled.returncode, len(messages(sampled))) == (0, 1), sampled.stderr
    assert messages(sampled)[0].startswith("warning: ")
    assert "from step 10" in sampled.stdout
    result = run_module("facevae_jax.main", *arguments)
    assert (result.returncode, messages(result)) == (0, []), result.stderr
    assert "resuming from step 10" in result.stdout


AS_OTHERS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # without root's rights


@pytest.mark.skipif(bool(AS_OTHERS) and shutil.which("setpriv") is None, reason="no setpriv")
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(finished, tiny_config, tmp_path):
    """Without the rights of root nothing is moved, and nothing is trained again."""
    run = shutil.copytree(finished[0], tmp_path / "run")
    closed = next(path for path in (run / "checkpoints" / "20" / "state").rglob("*") if path.is_file())
    closed.chmod(0)
    words = [*AS_OTHERS, sys.executable, "-m", "facevae_jax.main"]
    words += [*flags_of(tiny_config, train={"epochs": 3}), f"--workdir={run}"]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert_one_line_error(result, str(closed), "right")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]
    closed.chmod(0o600)
    (run / "checkpoints").chmod(0)
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    (run / "checkpoints").chmod(0o700)
    assert_one_line_error(result, f"{run}/checkpoints", "Permission denied")


def test_a_config_that_was_changed_by_hand_is_named(finished, tiny_config, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["latent_dim"] += 8
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"has the shape .* put back the config\.json"):
        facevae_jax.load(run)
    changed = change(tiny_config, model={"latent_dim": saved["model"]["latent_dim"]})
    with pytest.raises(UserError, match=r"has the shape .* put back the config\.json"):
        train(changed, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{}\n[1, 2]\n", b'{"kind": "tra'], ids=["bytes", "fields", "cut"])
def test_damaged_lines_of_the_metrics_cost_no_other(finished, tiny_config, tmp_path, damage):
    run = shutil.copytree(finished[0], tmp_path / "run")
    before = read_metrics(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    train(change(tiny_config, train={"epochs": 3}), run)
    records = read_metrics(run)
    assert records[: len(before)] == before
    assert records[-1]["step"] == 30
    assert len(records) == len((run / "metrics.jsonl").read_text().splitlines())


def test_checkpoints_of_versions_without_checksums_are_restored(finished, tiny_config, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20" / "record")
    assert_same_trees(train(tiny_config, tmp_path / "run"), finished[1])
    assert facevae_jax.load(tmp_path / "run").step in (10, 20)


def test_checksums_see_any_change_and_no_topology():
    rng = np.random.default_rng(0)
    tree = {"a": {"x": rng.normal(size=(8, 6)).astype(np.float32), "n": np.int32(7)}, "b": np.zeros(3, np.float32)}
    expected = checksums(tree)
    sharded = jax.device_put(tree["a"]["x"], NamedSharding(make_mesh(), PartitionSpec("data")))
    assert checksums({**tree, "a": {**tree["a"], "x": sharded}}) == expected
    words = tree["a"]["x"].view(np.uint32)
    for _ in range(200):
        row, column, bit = rng.integers(8), rng.integers(6), rng.integers(32)
        words[row, column] ^= np.uint32(1) << np.uint32(bit)
        assert checksums(tree)["a"] != expected["a"]
        assert checksums(tree)["b"] == expected["b"]
        words[row, column] ^= np.uint32(1) << np.uint32(bit)
    swapped = tree["a"]["x"].copy()
    swapped[0, 0], swapped[0, 1] = swapped[0, 1], swapped[0, 0]
    assert checksums({**tree, "a": {**tree["a"], "x": swapped}})["a"] != expected["a"]
    assert checksums({"b": -tree["b"]})["b"] != expected["b"]  # -0.0 is another bit pattern


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(tiny_config):
    config = change(tiny_config, train={"clip_norm": 1.0, "ema_decay": 0.9, "skip_factor": 4.0})
    setup = TrainSetup.of(config, make_mesh())
    images = jax.random.randint(jax.random.key(0), (16, 32, 32, 3), 0, 256).astype(jnp.uint8)
    step = jax.jit(functools.partial(train_step, setup=setup))
    state, batch = create_state(setup), Batch(images, jnp.arange(16))
    advanced, metrics = step(state, batch)
    assert (float(metrics.skipped), int(advanced.step)) == (0.0, 1)
    assert not np.array_equal(jax.tree.leaves(advanced.params)[0], jax.tree.leaves(state.params)[0])
    bad = advanced._replace(params=jax.tree.map(lambda leaf: leaf.at[..., :1].set(jnp.nan), advanced.params))
    skipped, metrics = step(bad, batch)
    assert (float(metrics.skipped), int(skipped.step)) == (1.0, 2)
    assert_same_trees(skipped._replace(step=bad.step), bad)


def test_a_gradient_far_above_the_running_norm_is_skipped_but_not_for_long(tiny_config):
    """The limit follows a norm that stays large, so no run stands still."""
    config = change(tiny_config, train={"skip_factor": 4.0, "learning_rate": 1e-6})
    setup = TrainSetup.of(config, make_mesh())
    images = jax.random.randint(jax.random.key(0), (16, 32, 32, 3), 0, 256).astype(jnp.uint8)
    step = jax.jit(functools.partial(train_step, setup=setup))
    state, batch = create_state(setup), Batch(images, jnp.arange(16))
    for _ in range(3):
        state, metrics = step(state, batch)
        assert float(metrics.too_large) == 0.0
    usual = state._replace(gradient_norm=RunningMean(state.gradient_norm.mean / 100, jnp.ones(())))
    skipped, metrics = step(usual, batch)
    assert (float(metrics.skipped), float(metrics.too_large)) == (0.0, 1.0)
    assert_same_trees(skipped._replace(step=usual.step, gradient_norm=usual.gradient_norm), usual)
    state, steps = skipped, 1
    while float(metrics.too_large) and steps < 200:
        state, metrics = step(state, batch)
        steps += 1
    assert 50 < steps < 150  # 1.03^108 is 100 / 4


def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(tiny_config, tmp_path):
    train(change(tiny_config, train={"epochs": 1}), tmp_path)
    broken = change(tiny_config, train={"epochs": 9, "learning_rate": 1e30, "max_skipped_steps": 7})
    with pytest.raises(UserError, match=r"checkpoints/10.*config\.train\.learning_rate"):
        train(broken, tmp_path)
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "train" and r["step"] > 10]
    assert sum(r["skipped"] for r in records) >= 5
    assert all(r["loss"] is None for r in records if r["skipped"])
    train(tiny_config, tmp_path)  # with a sound rate it resumes
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 20
    assert np.isfinite(last["loss"])


def test_a_gradient_that_stays_far_too_large_is_a_reason_to_stop():
    """What an exploded network has is finite and skipped, so the count of steps that are not finite misses it."""
    config, zeros = TrainConfig(skip_factor=4.0), np.zeros(10)
    skips = Skips()

    def add(too_large: np.ndarray, not_finite: np.ndarray = zeros) -> tuple[str, str] | None:
        loss = Loss(*[zeros] * len(Loss._fields))
        skips.add(Metrics(loss, gradient_norm=zeros, skipped=not_finite, too_large=too_large), count=8)
        return skips.diverged(config)

    before = MAX_UNLEARNED_STEPS // 8 - 1
    assert [add(zeros + 1) for _ in range(before)] == [None] * before
    assert add(np.arange(10) < 7) is None  # the eighth step learns
    assert [add(zeros + 1) for _ in range(before)] == [None] * before
    assert add(zeros, zeros + 1) is not None
    assert (skips.unlearned, skips.not_finite) == (MAX_UNLEARNED_STEPS, 8)


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_dead(tmp_path, tiny_config):
    arguments = [*flags_of(tiny_config, train={"epochs": 500}), f"--workdir={tmp_path}"]
    command = [sys.executable, "-m", "facevae_jax.main", *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert any(line.startswith("first step") for line in first.stdout)
        second = run_module("facevae_jax.main", *arguments)
        assert_one_line_error(second, str(tmp_path), str(first.pid))
        assert first.poll() is None
        first.kill()
    third = run_module("facevae_jax.main", *arguments, "--config.train.epochs=1")
    assert third.returncode == 0, third.stderr


@pytest.mark.slow
def test_a_signal_before_there_is_anything_to_save_ends_at_once(tmp_path, tiny_config):
    command = [sys.executable, "-m", "facevae_jax.main", *flags_of(tiny_config), f"--workdir={tmp_path}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}  # so that it has to compile
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("feed") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 143
    assert "SIGTERM" in rest


def test_an_evaluation_that_was_cut_short_is_made_after_resuming(finished, tiny_config, tmp_path):
    workdir, expected = finished
    asked = []

    def should_stop(step):
        asked.append(step)
        return asked.count(10) > 1  # after the dispatch that ends at 10 comes its evaluation

    train(tiny_config, tmp_path, should_stop=should_stop)
    assert json.loads((tmp_path / "checkpoints" / "10" / "record" / "metadata").read_text())["evaluated"] is False
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "evaluation"] == []
    assert_same_trees(train(tiny_config, tmp_path), expected)
    assert sorted(losses_of(tmp_path)) == sorted(losses_of(workdir))


@pytest.mark.slow
def test_a_full_disk_is_one_line(tiny_config, tmp_path):
    """A file system of 200 kB, in a namespace of its own."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    workdir = tmp_path / "small"
    workdir.mkdir()
    words = [sys.executable, "-m", "facevae_jax.main", *flags_of(tiny_config), f"--workdir={workdir}"]
    script = f'mount -t tmpfs -o size=200k none {workdir} 2>/dev/null || exit 99; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if result.returncode in (1, 99) and "Traceback" not in result.stderr:
        pytest.skip("mounting is not allowed here")
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert str(workdir) in errors[0]
    assert "Traceback" not in result.stderr
