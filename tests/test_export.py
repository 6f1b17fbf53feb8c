"""An exported model gives what the run's model gives, in every format; what is damaged or foreign is refused."""

import json
import math
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
from facevae_jax.errors import UserError
from facevae_jax.exporting import contents, programs, publishing, weights
from facevae_jax.files import write_json
from facevae_jax.generation import loading
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.models.vae import ACTIVATIONS
from facevae_jax.training.checkpoints import Checkpoints
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.sharding import make_mesh, replicated
from facevae_jax.training.state import abstract_state, make_model, make_optimizer
from tests.conftest import assert_one_line_error, change, run_module

STEP = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_ONNX = "needs the extra `onnx`"


def scattered(tree, *, seed):
    """Arrays of a tree's shapes, as far from a new model's biases of 0 and scales of 1 as a trained one's are."""
    random = np.random.default_rng(seed)

    def make_leaf(path, leaf):
        noise = random.normal(size=leaf.shape).astype(np.float32)
        match jax.tree_util.keystr(path[-1:], simple=True):
            case "kernel":
                return noise * np.float32(2 / math.sqrt(math.prod(leaf.shape[:-1])))
            case "var":
                return np.exp(noise)
            case "scale":
                return 1 + np.float32(0.3) * noise
        return np.float32(0.3) * noise

    return jax.tree_util.tree_map_with_path(make_leaf, tree)


def scattered_state(config: RunConfig):
    """A state that looks like a trained one, at no cost; numpy arrays."""
    state = abstract_state(config, make_model(config), make_optimizer(config.train, total_steps=1), make_mesh())
    size = config.model.latent_dim
    root = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return zeros.replace(
        params=scattered(state.params, seed=1),
        batch_stats=scattered(state.batch_stats, seed=2),
        averaged=None if state.averaged is None else scattered(state.averaged, seed=3),
        latent_moments=LatentMoments(np.float32(37), np.arange(size, dtype=np.float32) / 10, root @ root.T),
    )


def scattered_model(config: RunConfig) -> RestoredModel:
    state = scattered_state(config)
    variables, moments = jax.device_put((state.evaluation_variables, state.latent_moments))
    return RestoredModel(config, make_model(config), variables, moments, state.decoder_variance, STEP)


def expected(restored, images, latents):
    """Posterior and images in [0, 1], by the model in the form that runs here."""

    @jax.jit
    def compute(variables):
        model = restored.model
        return (model.apply(variables, images, method="encode"), model.apply(variables, latents, method="decode"))

    posterior, decoded = jax.device_get(compute(restored.variables))
    assert np.std(posterior.mean) > 0.1  # else any program would do
    assert np.std(decoded) > 0.1
    return posterior, decoded


@pytest.fixture(scope="module")
def config(tiny_config) -> RunConfig:
    return change(tiny_config, train={"ema_decay": 0.9}, objective={"likelihood": "gaussian", "variance": "learned"})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory) -> pathlib.Path:
    """A run with a checkpoint, that trained nothing."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    workdir.mkdir()
    write_json(workdir / "config.json", config.to_dict())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(jax.device_put(scattered_state(config), replicated(make_mesh())), step=STEP, loss=1.0)
    return workdir


@pytest.fixture(scope="module")
def command(workdir):
    """What the command said, and the folder that it wrote."""
    folder = workdir.parent / "exported"
    return run_module("facevae_jax.export", f"--workdir={workdir}", f"--output={folder}"), folder


@pytest.fixture(scope="module")
def exported(command) -> pathlib.Path:
    result, folder = command
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> pathlib.Path:
    """An exported folder to spoil."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def original(workdir):
    return facevae_jax.load(workdir)


def inputs(count, config):
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, config.data.resolution, config.data.resolution, 3), np.uint8)
    return images, random.normal(size=(count, config.model.latent_dim)).astype(np.float32)


def test_the_command_says_what_it_wrote(command):
    result, folder = command
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: averaged parameters of step 7"
    names = ["config.json", "decoder.stablehlo", "encoder.stablehlo", "export.json", "model.safetensors"]
    assert [line.split()[0] for line in lines[1:]] == names == sorted(path.name for path in folder.iterdir())
    assert all("from the model" in line for line in lines if "stablehlo" in line)
    facts = json.loads((folder / "export.json").read_text())
    assert (facts["format_version"], facts["step"], facts["averaged"]) == (1, STEP, True)
    assert list(folder.parent.glob(".*")) == []


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_the_exported_model_is_the_runs_bit_by_bit(original, exported, name):
    loaded = facevae_jax.load(exported / name)
    assert (loaded.step, loaded.config, loaded.folder) == (STEP, original.config, exported)
    images, latents = inputs(5, original.config)
    np.testing.assert_array_equal(loaded.decode(latents), original.decode(latents))
    for ours, theirs in zip(loaded.encode(images), original.encode(images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for prior in ("standard", "gaussian"):
        np.testing.assert_array_equal(loaded.sample(3, prior=prior), original.sample(3, prior=prior))
    equal = jax.tree.map(np.array_equal, (loaded.variables, loaded.moments), (original.variables, original.moments))
    assert all(jax.tree.leaves(equal))


def test_the_averaged_parameters_are_exported(config, exported):
    with safetensors.safe_open(exported / "model.safetensors", framework="numpy") as file:
        metadata, names = file.metadata(), set(file.keys())
        kernel = file.get_tensor("params/decoder/Dense_0/kernel")
    state = scattered_state(config)
    np.testing.assert_array_equal(kernel, state.averaged["params"]["decoder"]["Dense_0"]["kernel"])
    assert not np.array_equal(kernel, state.params["decoder"]["Dense_0"]["kernel"])
    assert metadata["averaged"] == "true"
    others = {
        "params/decoder_log_variance",
        "latent_moments/images",
        "latent_moments/mean",
        "latent_moments/covariance",
    }
    assert others < names
    assert "batch_stats/encoder/Stage_0/BatchNorm_0/var" in names


def test_without_averages_and_statistics(tiny_config, tmp_path):
    restored = scattered_model(change(tiny_config, model={"normalization": "none"}))
    (tmp_path / "mine.safetensors").write_bytes(weights.serialize(restored))
    loaded = facevae_jax.load(tmp_path / "mine.safetensors")
    equal = jax.tree.map(np.array_equal, (loaded.variables, loaded.moments), tuple(restored[2:4]))
    assert all(jax.tree.leaves(equal))
    assert loaded.folder == tmp_path / "mine"  # nothing of two files in one folder is mistaken for each other's
    assert '"averaged":"false"' in (tmp_path / "mine.safetensors").read_bytes()[:5000].decode(errors="replace")


def test_an_exported_model_is_exported_again(exported, tmp_path):
    publishing.export(loading.restore(exported), tmp_path / "again", onnx=False)
    first, second = (safetensors.numpy.load_file(f / "model.safetensors") for f in (exported, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_pictures_are_drawn_from_an_exported_model(workdir, exported, tmp_path):
    said = []
    for name, place in (("a.png", workdir), ("b.png", exported)):
        arguments = (f"--workdir={place}", "--count=3", "--prior=gaussian", f"--output={tmp_path / name}")
        said.append(run_module("facevae_jax.generate", "sample", *arguments))
    assert [result.returncode for result in said] == [0, 0], said[1].stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    arguments = (f"--images={tmp_path / 'a.png'}", f"--output={tmp_path / 'c.png'}")
    result = run_module("facevae_jax.generate", "reconstruct", f"--workdir={exported}", *arguments)
    assert result.returncode == 0, result.stderr


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


def test_programs_are_read_for_python(exported, original):
    read = programs.read_programs(exported)
    images, latents = inputs(2, original.config)
    np.testing.assert_allclose(read.encode(images).mean, original.encode(images).mean, **CLOSE)
    assert read.decode(latents).shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("normalization", "activation", "kernel_size"),
    [
        ("batch", "leaky_relu", 3),
        ("batch", "gelu", 4),
        ("group", "silu", 5),
        ("group", "leaky_relu", 4),
        ("none", "relu", 3),
    ],
)
def test_onnx_gives_what_the_model_gives(tiny_config, normalization, activation, kernel_size):
    pytest.importorskip("onnx", reason=NO_ONNX)
    runtime = pytest.importorskip("onnxruntime", reason=NO_ONNX)
    from facevae_jax.exporting import onnx_graphs

    sections = {"normalization": normalization, "activation": activation, "kernel_size": kernel_size}
    restored = scattered_model(change(tiny_config, model=sections | {"filters": (12, 16, 24)}))  # groups of 4 and 8
    files = onnx_graphs.serialize_graphs(restored)
    encoder, decoder = (runtime.InferenceSession(files[n]) for n in (onnx_graphs.ENCODER, onnx_graphs.DECODER))
    images, latents = inputs(5, restored.config)
    posterior, decoded = expected(restored, images, latents)
    for count in (1, 5):
        outputs = encoder.run(["mean", "log_variance"], {"images": images[:count]})
        for found, wanted in zip(outputs, posterior, strict=True):
            np.testing.assert_allclose(found, wanted[:count], rtol=1e-4, atol=1e-4)
        outputs = decoder.run(None, {"latents": latents[:count]})
        np.testing.assert_allclose(outputs[0], decoded[:count], atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onnx_knows_every_activation(tiny_config, activation):
    pytest.importorskip("onnx", reason=NO_ONNX)
    from facevae_jax.exporting import onnx_graphs

    assert onnx_graphs.serialize_graphs(scattered_model(change(tiny_config, model={"activation": activation})))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onnx_is_exported_and_compared(tiny_config, tmp_path, dtype):
    pytest.importorskip("onnx", reason=NO_ONNX)
    pytest.importorskip("onnxruntime", reason=NO_ONNX)
    restored = scattered_model(change(tiny_config, model={"dtype": dtype}))
    differences = publishing.export(restored, tmp_path / "out", onnx=True)
    assert set(differences) == {"encoder.stablehlo", "decoder.stablehlo", "encoder.onnx", "decoder.onnx"}
    recorded = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert recorded["decoder.onnx"]["max_abs_difference"] == differences["decoder.onnx"].largest < 1e-5


def test_what_differs_from_the_model_is_not_published(config, tmp_path, monkeypatch):
    restored = scattered_model(config)
    other = scattered_model(change(config, model={"activation": "relu"}))
    monkeypatch.setattr(programs, "serialize_programs", lambda _, honest=programs.serialize_programs: honest(other))
    with pytest.raises(UserError, match=r"coder.stablehlo differs from the model by .*: nothing was exported"):
        publishing.export(restored, tmp_path / "out", onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_number_is_not_published(config, tmp_path):
    restored = scattered_model(config)
    restored.variables["params"]["decoder"]["Dense_0"]["bias"] *= np.nan
    with pytest.raises(UserError, match=r"decoder.stablehlo differs from the model by nan"):
        publishing.export(restored, tmp_path / "out", onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_extra_is_told(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "facevae-jax\[onnx\]"'):
        publishing.export(scattered_model(config), tmp_path / "out", onnx=True)


def test_mistakes_are_told_in_one_line(workdir, exported, tmp_path):
    module, output = "facevae_jax.export", f"--output={tmp_path / 'new'}"
    assert_one_line_error(run_module(module, output), "--workdir")
    assert_one_line_error(run_module(module, f"--workdir={workdir}"), "--output")
    assert_one_line_error(run_module(module, f"--workdir={workdir}", output, "extra"), "extra")
    full = f"--output={exported}"
    assert_one_line_error(run_module(module, f"--workdir={workdir}", full), str(exported), "exists already")
    assert_one_line_error(run_module(module, f"--workdir={tmp_path / 'no'}", output), str(tmp_path / "no"))
    (tmp_path / "file").touch()
    below = f"--output={tmp_path / 'file' / 'x'}"
    assert_one_line_error(run_module(module, f"--workdir={workdir}", below), "--output")
    assert not (tmp_path / "new").exists()


def rewrite(path, *, tensors=None, metadata=None):
    """Changes some tensors and metadata of a file; None drops a tensor."""
    with safetensors.safe_open(path, framework="numpy") as file:
        found, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    found = {name: array for name, array in (found | (tensors or {})).items() if array is not None}
    path.write_bytes(safetensors.numpy.save(found, facts | (metadata or {})))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BIAS = "params/decoder/Dense_0/bias"
SPOILED = {
    "truncated": (truncate, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "flipped": (flip_a_bit, "damaged: its checksum"),
    "setting": (lambda path: rewrite(path, metadata={"step": "8"}), "damaged: its checksum"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "no safetensors file"),
    "foreign": (lambda path: path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)})), "was not written by"),
    "newer": (lambda path: rewrite(path, metadata={"format_version": "2"}), "format version 2"),
    "version": (lambda path: rewrite(path, metadata={"format_version": "x"}), "format version"),
    "config": (lambda path: rewrite(path, metadata={"config": "[1]"}), "metadata cannot be read"),
    "key": (lambda path: rewrite(path, metadata={"config": '{"x": 1}'}), "metadata cannot be read"),
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
    with pytest.raises(UserError, match=r"no exported model"):
        programs.read_programs(tmp_path)


def test_a_run_is_not_mistaken_for_an_export(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"of something else")
    assert facevae_jax.load(tmp_path / "run").step == STEP
