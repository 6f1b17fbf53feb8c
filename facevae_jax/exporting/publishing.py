"""An exported folder: written aside, each file read back and compared with the model, then renamed."""

import dataclasses
import pathlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

import facevae_jax
from facevae_jax.config import CHANNELS
from facevae_jax.errors import UserError, make_writable_directory
from facevae_jax.exporting import contents, programs, weights
from facevae_jax.files import atomic_writer, write_json
from facevae_jax.models.inference import encode
from facevae_jax.models.vae import VAE
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.workdir import CONFIG_FILE

CHECKED = 3  # images and latents, random, that every file is compared on
# Of the difference from the model, where its largest value is 1 or less; above, relative to that. In float32 two
# orders of the same sums differ by 1e-6; whatever is really wrong, such as a padding, gives more than 1e-2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class Difference(NamedTuple):
    """The largest difference of a file from the model, and what would be too much."""

    largest: float
    allowed: float


class _Expected(NamedTuple):
    """What the model gives for random images and latents."""

    images: UInt8[np.ndarray, "b r r 3"]
    latents: Float32[np.ndarray, "b z"]
    posterior: tuple[np.ndarray, np.ndarray]  # mean and log variance
    decoded: Float32[np.ndarray, "b r r 3"]
    tolerance: float

    def encoder(self, function: Callable[[Any], Sequence[Any]]) -> Difference:
        """Of a function that gives mean and log variance."""
        return _difference(function(self.images), self.posterior, self.tolerance)

    def decoder(self, function: Callable[[Any], Any]) -> Difference:
        """Of a function that gives images in [0, 1]."""
        return _difference([function(self.latents)], [self.decoded], self.tolerance)


def export(restored: RestoredModel, output: pathlib.Path, *, onnx: bool) -> dict[str, Difference]:
    """Writes the folder; returns how far each program in it is from the model.

    Args:
      restored: the model.
      output: the folder, which must not exist, or be empty.
      onnx: whether ONNX graphs are written too.

    Raises:
      UserError: the model is a baseline; `onnx` without the extra of that name; a folder that exists or cannot be
        written to; a file that does not give what the model gives, after which there is no folder.
    """
    if onnx:
        require_onnx()
    if restored.config.model.kind != "vae":
        raise UserError(f"a run of config.model.kind={restored.config.model.kind!r} is not exported: only a vae is.")
    check_output(output)
    output = output.resolve()  # `.` and `..` have no name to write aside
    make_writable_directory(output.parent, name="--output")
    aside = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.mkdir()
        differences = _write(restored, aside, onnx=onnx)
        aside.replace(output)  # takes the place of an empty folder too
    except OSError as error:
        raise UserError(f"--output={str(output)!r} cannot be written to: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return differences


def check_output(output: pathlib.Path) -> None:
    """Raises a UserError where there is something already."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UserError(f"--output={str(output)!r} exists already: remove it, or name a new folder.")


def require_onnx() -> None:
    """Raises a UserError where the extra `onnx` is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError('--onnx needs onnx and onnxruntime: pip install "facevae-jax[onnx]".') from error


def _write(restored: RestoredModel, folder: pathlib.Path, *, onnx: bool) -> dict[str, Difference]:
    """Writes all files, `export.json` at last, and compares them with the model."""
    files = {weights.FILE: weights.serialize(restored)} | programs.serialize_programs(restored)
    if onnx:
        from facevae_jax.exporting import onnx_graphs  # needs the extra `onnx`

        files |= onnx_graphs.serialize_graphs(restored)
    for name, content in files.items():
        with atomic_writer(folder / name) as file:  # for the flush to the disk
            file.write(content)
    write_json(folder / CONFIG_FILE, restored.config.to_dict())
    described: dict[str, dict[str, Any]] = {
        name: {"sha256": contents.sha256(content)} for name, content in files.items()
    }
    facts = {
        "format": weights.FORMAT,
        "format_version": weights.VERSION,
        "step": restored.step,
        "averaged": weights.is_averaged(restored.config),
        "resolution": restored.config.data.resolution,
        "latent_dim": restored.config.model.latent_dim,
        "versions": {"facevae_jax": facevae_jax.__version__, "jax": jax.__version__},
        "platforms": programs.PLATFORMS,
        "files": described,
    }
    write_json(folder / contents.FILE, facts)
    _check_weights(restored, folder)
    differences = _compare_programs(restored, folder) | (_compare_graphs(restored, folder) if onnx else {})
    for name, difference in differences.items():
        if not difference.largest <= difference.allowed:  # also where it is no number
            raise UserError(
                f"{name} differs from the model by {difference.largest:.2g}, more than {difference.allowed:.2g}: "
                "nothing was exported."
            )
        described[name]["max_abs_difference"] = difference.largest
    write_json(folder / contents.FILE, facts)
    return differences


def _check_weights(restored: RestoredModel, folder: pathlib.Path) -> None:
    """Raises a UserError unless every array is read back bit by bit."""
    read = weights.read_model(folder)
    for ours, theirs in ((restored.variables, read.variables), (restored.latent_moments, read.latent_moments)):
        equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), ours, theirs)
        if not all(jax.tree.leaves(equal)):
            raise UserError(f"{weights.FILE} does not give back the model's arrays: nothing was exported.")


def _compare_programs(restored: RestoredModel, folder: pathlib.Path) -> dict[str, Difference]:
    expected = _expected(restored, restored.model, TOLERANCE[restored.config.model.dtype])
    read = programs.read_programs(folder)
    return {
        programs.ENCODER: expected.encoder(read.encode),
        programs.DECODER: expected.decoder(read.decode),
    }


def _compare_graphs(restored: RestoredModel, folder: pathlib.Path) -> dict[str, Difference]:
    import onnxruntime

    from facevae_jax.exporting import onnx_graphs

    config = dataclasses.replace(restored.config, model=dataclasses.replace(restored.config.model, dtype="float32"))
    with jax.default_matmul_precision("highest"):  # a GPU's default, TF32, has 10 bits
        expected = _expected(restored, programs.plain_model(config), TOLERANCE["float32"])

    def runner(name: str) -> Callable[[np.ndarray], Any]:
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        return lambda values: session.run(None, {session.get_inputs()[0].name: values})

    encoder, decoder = runner(onnx_graphs.ENCODER), runner(onnx_graphs.DECODER)
    return {
        onnx_graphs.ENCODER: expected.encoder(encoder),
        onnx_graphs.DECODER: expected.decoder(lambda latents: decoder(latents)[0]),
    }


def _expected(restored: RestoredModel, model: VAE, tolerance: float) -> _Expected:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (CHECKED, model.resolution, model.resolution, CHANNELS), np.uint8)
    latents = random.normal(size=(CHECKED, restored.config.model.latent_dim)).astype(np.float32)
    mean, log_variance = jax.jit(lambda variables: encode(model, variables, jnp.asarray(images)))(restored.variables)
    decode: Any = jax.jit(lambda variables: model.apply(variables, latents, method="decode"))
    decoded = decode(restored.variables)
    return _Expected(images, latents, (np.asarray(mean), np.asarray(log_variance)), np.asarray(decoded), tolerance)


def _difference(found: Sequence[Any], expected: Sequence[np.ndarray], tolerance: float) -> Difference:
    largest = max(float(np.max(np.abs(np.asarray(f) - e))) for f, e in zip(found, expected, strict=True))
    scale = max(float(np.max(np.abs(e))) for e in expected)
    return Difference(largest, tolerance * max(1.0, scale))
