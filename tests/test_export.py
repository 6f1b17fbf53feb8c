"""An exported model gives what the run's model gives, in every format; what is damaged or foreign is refused."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import facevae_jax
from facevae_jax.config import RunConfig
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import write_json
from facevae_jax.exporting import contents, programs, publishing
from facevae_jax.trained import loading, weights
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.setup import make_mesh, replicated
from tests.conftest import assert_same_trees, change, messages, run_module
from tests.scattered import STEP, expected, inputs, scattered_model, scattered_state

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def config(tiny_config) -> RunConfig:
    return change(tiny_config, train={"ema_decay": 0.9}, objective={"likelihood": "gaussian", "variance": "learned"})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run with a checkpoint, that trained nothing."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    workdir.mkdir()
    write_json(workdir / "config.json", config.to_dict())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(jax.device_put(scattered_state(config), replicated(make_mesh())), step=STEP, loss=1.0)
    return workdir


@pytest.fixture(scope="module")
def original(run):
    return facevae_jax.load(run)


@pytest.fixture(scope="module")
def exported(run, original) -> pathlib.Path:
    folder = run.parent / "exported"
    publishing.export(original.portable(), folder, onnx=False)
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> pathlib.Path:
    """An exported folder to spoil."""
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_folder_is_described(exported):
    names = ["config.json", "decoder.stablehlo", "encoder.stablehlo", "export.json", "model.safetensors"]
    assert sorted(path.name for path in exported.iterdir()) == names
    facts = json.loads((exported / "export.json").read_text())
    assert (facts["format_version"], facts["step"], facts["averaged"], facts["code_shape"]) == (2, STEP, True, [8])
    assert all(facts["files"][name]["max_abs_difference"] < 1e-4 for name in names if "stablehlo" in name)
    assert list(exported.parent.glob(".*")) == []


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_the_exported_model_is_the_runs_bit_by_bit(original, exported, name):
    loaded = facevae_jax.load(exported / name)
    assert (loaded.step, loaded.config, loaded.folder) == (STEP, original.config, exported)
    images, latents = inputs(5, original.config)
    np.testing.assert_array_equal(loaded.decode(latents), original.decode(latents))
    for ours, theirs in zip(loaded.encode(images), original.encode(images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(loaded.sample(3, prior="standard"), original.sample(3, prior="standard"))
    np.testing.assert_allclose(loaded.sample_codes(3), original.sample_codes(3), rtol=1e-5, atol=1e-5)
    assert_same_trees(loaded.variables, original.variables)
    moments = original.moments  # of the training split, to which the run's are fitted in float64
    for found, wanted in zip(loaded.moments, moments, strict=True):
        np.testing.assert_array_equal(found, np.asarray(wanted, np.float32))


def test_the_averaged_parameters_are_exported(config, exported):
    with safetensors.safe_open(exported / "model.safetensors", framework="numpy") as file:
        metadata, names = file.metadata(), set(file.keys())
        kernel = file.get_tensor("params/decoder/Dense_0/kernel")
    state = scattered_state(config)
    np.testing.assert_array_equal(kernel, state.averaged["params"]["decoder"]["Dense_0"]["kernel"])
    assert not np.array_equal(kernel, state.params["decoder"]["Dense_0"]["kernel"])
    assert metadata["averaged"] == "true"
    assert {f"latent_moments/{name}" for name in ("images", "mean", "covariance")} < names
    assert "params/decoder_log_variance" in names
    assert "batch_stats/encoder/Stage_0/BatchNorm_0/var" in names


def test_without_averages_and_statistics(tiny_config, tmp_path):
    restored = scattered_model(change(tiny_config, model={"normalization": "none"}))
    (tmp_path / "mine.safetensors").write_bytes(weights.serialize(restored))
    loaded = facevae_jax.load(tmp_path / "mine.safetensors")
    assert_same_trees((loaded.variables, loaded.moments), (restored.variables, restored.moments))
    assert loaded.folder == tmp_path / "mine"  # nothing of two files in one folder is mistaken for each other's


def test_an_exported_model_is_exported_again(exported, tmp_path):
    publishing.export(loading.load(exported).portable(), tmp_path / "again", onnx=False)
    first, second = (safetensors.numpy.load_file(f / "model.safetensors") for f in (exported, tmp_path / "again"))
    assert_same_trees(first, second)


@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
def test_stablehlo_gives_what_the_model_gives(tiny_config, normalization):
    restored = scattered_model(change(tiny_config, model={"normalization": normalization}))
    files = programs.serialize_programs(restored)
    encoder, decoder = (jax.export.deserialize(bytearray(files[n])) for n in (programs.ENCODER, programs.DECODER))
    assert encoder.platforms == decoder.platforms == ("cpu", "cuda", "tpu")
    assert not any(b".py" in content for content in files.values())  # where the sources are on this machine
    images, latents = inputs(5, restored.config)
    posterior, decoded = expected(restored, images, latents)
    for count in (1, 5):
        for found, wanted in zip(encoder.call(images[:count]), posterior, strict=True):
            np.testing.assert_allclose(found, wanted[:count], **CLOSE)
        np.testing.assert_allclose(decoder.call(latents[:count]), decoded[:count], **CLOSE)


def test_stablehlo_needs_jax_alone(exported, original):
    _, latents = inputs(2, original.config)
    program = (
        "import sys; sys.modules['facevae_jax'] = sys.modules['flax'] = None\n"
        "import numpy, pathlib, jax.export\n"
        f"file = pathlib.Path({str(exported / 'decoder.stablehlo')!r})\n"
        "decoder = jax.export.deserialize(bytearray(file.read_bytes()))\n"
        f"faces = decoder.call(numpy.array({latents.tolist()}, numpy.float32))\n"
        "print((faces * 255).round().astype('uint8').tolist())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    difference = np.array(json.loads(result.stdout), np.int16) - original.decode(latents)
    assert np.abs(difference).max() <= 1  # a value halfway between two may be rounded either way
    assert np.mean(difference != 0) < 1e-3


def test_what_differs_from_the_model_or_is_not_finite_is_not_published(config, tmp_path, monkeypatch):
    restored = scattered_model(config)
    other = scattered_model(change(config, model={"activation": "relu"}))
    with monkeypatch.context() as patched:
        patched.setattr(programs, "serialize_programs", lambda _, honest=programs.serialize_programs: honest(other))
        with pytest.raises(UserError, match=r"coder.stablehlo differs"):
            publishing.export(restored, tmp_path / "out", onnx=False)
    restored.variables["params"]["decoder"]["Dense_0"]["bias"] *= np.nan
    with pytest.raises(UserError, match=r"decoder.stablehlo differs from the model by nan"):
        publishing.export(restored, tmp_path / "out", onnx=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(run, exported, tmp_path):
    module, new = "facevae_jax.export", tmp_path / "new"
    result = run_module(module, f"--workdir={run}", f"--output={new}")
    assert (result.returncode, messages(result)) == (0, []), result.stderr
    lines = result.stdout.splitlines()
    assert str(new) in lines[0]
    assert [line.split()[0] for line in lines[1:]] == sorted(path.name for path in new.iterdir() if path.is_file())
    assert_same_trees(*(safetensors.numpy.load_file(folder / "model.safetensors") for folder in (new, exported)))


def rewrite(path, *, tensors=None, metadata=None):
    """Changes some tensors and metadata of a file; None drops a tensor."""
    with safetensors.safe_open(path, framework="numpy") as file:
        found, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    found = {name: array for name, array in (found | (tensors or {})).items() if array is not None}
    path.write_bytes(safetensors.numpy.save(found, facts | (metadata or {})))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BIAS = "params/decoder/Dense_0/bias"
SPOILED = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "flipped": (flip_a_bit, "damaged: its checksum"),
    "setting": (lambda path: rewrite(path, metadata={"step": "8"}), "damaged: its checksum"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "no safetensors file"),
    "foreign": (lambda path: path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)})), "was not written by"),
    "newer": (lambda path: rewrite(path, metadata={"format_version": "3"}), "format version 3"),
    "config": (lambda path: rewrite(path, metadata={"config": "{"}), "metadata cannot be read"),
    "lacking": (lambda path: rewrite(path, tensors={BIAS: None}), f"lacks 1 .*{BIAS}"),
    "extra": (lambda path: rewrite(path, tensors={"x/y": np.zeros(2)}), "has 1 tensors .*x/y"),
    "shape": (lambda path: rewrite(path, tensors={BIAS: np.zeros(3, np.float32)}), rf"{BIAS} is float32\[3\]"),
    "dtype": (lambda path: rewrite(path, tensors={BIAS: np.zeros(1024)}), rf"{BIAS} is float64\[1024\]"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_refused_in_one_line(copy, how):
    spoil, said = SPOILED[how]
    spoil(copy / "model.safetensors")
    for place in (copy, copy / "model.safetensors"):
        with pytest.raises(UserError, match=said) as error:
            facevae_jax.load(place)
        assert str(copy / "model.safetensors") in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match=str(place)):
            facevae_jax.load(place)


def test_where_the_data_are_may_change_in_an_exported_folder(copy, config):
    moved = change(config, data={"data_dir": "/elsewhere"})
    write_json(copy / "config.json", moved.to_dict())
    assert facevae_jax.load(copy).config == moved
    assert facevae_jax.load(copy / "model.safetensors").config == config
    for section in ({"model": {"activation": "relu"}}, {"data": {"resolution": 64}}):
        write_json(copy / "config.json", change(config, **section).to_dict())
        with pytest.raises(UserError, match=r"config.json: (model.activation|data.resolution) is"):
            facevae_jax.load(copy)
    (copy / "config.json").unlink()
    assert facevae_jax.load(copy).config == config


def test_a_spoiled_program_is_refused(copy, tmp_path):
    flip_a_bit(copy / "encoder.stablehlo")
    with pytest.raises(UserError, match=r"encoder.stablehlo is damaged"):
        programs.read_programs(copy)
    (copy / "encoder.stablehlo").unlink()
    with pytest.raises(UserError, match=r"encoder.stablehlo cannot be read"):
        programs.read_programs(copy)
    with pytest.raises(UserError, match=r"was exported without encoder.onnx"):
        contents.check_file(copy, "encoder.onnx")
    (copy / "export.json").write_text("[]")
    with pytest.raises(UserError, match=r"export.json cannot be read"):
        programs.read_programs(copy)
    with pytest.raises(UserError, match=r"export\.json"):
        programs.read_programs(tmp_path)


def test_a_run_is_not_mistaken_for_an_export(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"of something else")
    assert facevae_jax.load(tmp_path / "run").step == STEP
