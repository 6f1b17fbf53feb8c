"""Writes an exported folder: to a temporary name, where every file is read back and compared with the model."""

import functools
import math
import pathlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import facevae_jax
from facevae_jax.core.errors import UserError, make_writable_directory
from facevae_jax.core.files import atomic_writer, write_json
from facevae_jax.exporting import contents, programs
from facevae_jax.trained import weights
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import make_model
from facevae_jax.training.workdir import CONFIG_FILE

CHECKED = 3  # random images and codes that every file is compared on
# Allowed difference from the model, relative to its largest value where that is above 1. In float32 another order of
# the same sums differs by 1e-6; a real mistake, such as wrong padding, by more than 1e-2.
TOLERANCE = {"auto": 1e-4, "float32": 1e-4, "bfloat16": 5e-2}


class Difference(NamedTuple):
    """The largest difference of a file from the model, and the largest that is allowed."""

    largest: float
    allowed: float


def export(restored: Restored, output: pathlib.Path, *, onnx: bool) -> dict[str, Difference]:
    """Writes the folder, and returns how far each of its programs is from the model.

    Args:
      restored: the model.
      output: the folder, which must not exist, or be empty.
      onnx: whether ONNX graphs are written too.

    Raises:
      UserError: `onnx` without the extra `onnx`, or for a model with an operation that has no ONNX operator here;
        the folder exists or cannot be written; or a file differs from the model. Then no folder is left.
    """
    if onnx:
        require_onnx()
    check_output(output)
    output = output.resolve()  # `.` and `..` have no name
    make_writable_directory(output.parent, name="--output")
    aside = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.mkdir()
        differences = _write(restored, aside, onnx=onnx)
        aside.replace(output)  # also replaces an empty folder
    except OSError as error:
        raise UserError(f"--output={str(output)!r} cannot be written to: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return differences


def check_output(output: pathlib.Path) -> None:
    """Raises a UserError unless the folder is missing or empty."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UserError(f"--output={str(output)!r} exists already: remove it, or name a new folder.")


def require_onnx() -> None:
    """Raises a UserError unless the extra `onnx` is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError('--onnx needs onnx and onnxruntime: pip install "facevae-jax[onnx]".') from error


def _write(restored: Restored, folder: pathlib.Path, *, onnx: bool) -> dict[str, Difference]:
    """Writes all files, and compares them with the model."""
    files = {weights.FILE: weights.serialize(restored)} | programs.serialize_programs(restored)
    if onnx:
        from facevae_jax.exporting import onnx_graphs  # needs the extra `onnx`

        files |= onnx_graphs.serialize_graphs(restored)
    for name, content in files.items():
        with atomic_writer(folder / name) as file:  # flushes to the disk
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
        "code_shape": list(make_model(restored.config)[0].code_shape),
        "versions": {"facevae_jax": facevae_jax.__version__, "jax": jax.__version__},
        "platforms": programs.PLATFORMS,
        "files": described,
    }
    write_json(folder / contents.FILE, facts)
    _check_weights(restored, folder)
    differences = _compare_programs(restored, folder) | (_compare_graphs(restored, folder) if onnx else {})
    for name, difference in differences.items():
        if not difference.largest <= difference.allowed:  # also where it is NaN
            raise UserError(
                f"{name} differs from the model by {difference.largest:.2g}, more than {difference.allowed:.2g}: "
                "nothing was exported."
            )
        described[name]["max_abs_difference"] = difference.largest
    write_json(folder / contents.FILE, facts)
    return differences


def _check_weights(restored: Restored, folder: pathlib.Path) -> None:
    """Raises a UserError unless the arrays that are read back are equal in every bit."""
    trees = (weights.tree_of(model) for model in (restored, weights.read_model(folder)))
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), *trees)
    if not all(jax.tree.leaves(equal)):
        raise UserError(f"{weights.FILE} differs from the model: nothing was exported.")


def _compare_programs(restored: Restored, folder: pathlib.Path) -> dict[str, Difference]:
    read, tolerance = programs.read_programs(folder), TOLERANCE[getattr(restored.config.model, "dtype", "auto")]
    functions = {programs.ENCODER: read.encode, programs.DECODER: lambda codes: [read.decode(codes)]}
    return _differences(restored, functions, tolerance)


def _compare_graphs(restored: Restored, folder: pathlib.Path) -> dict[str, Difference]:
    import onnxruntime

    from facevae_jax.exporting import onnx_graphs

    def runner(name: str) -> Callable[[np.ndarray], Any]:
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        return lambda values: session.run(None, {session.get_inputs()[0].name: values})

    functions = {name: runner(name) for name in (onnx_graphs.ENCODER, onnx_graphs.DECODER)}
    with jax.default_matmul_precision("highest"):  # a GPU's default, TF32, has 10 bits
        return _differences(onnx_graphs.in_float32(restored), functions, TOLERANCE["float32"])


def _differences(
    restored: Restored, functions: dict[str, Callable[[Any], Sequence[Any]]], tolerance: float
) -> dict[str, Difference]:
    """How far an encoder and a decoder, by file, are from the model, for random images and codes."""
    model, _ = make_model(restored.config)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (CHECKED, *model.image_shape), np.uint8)
    codes = random.normal(size=(CHECKED, *model.code_shape)).astype(np.float32)

    def apply(method: str, x: np.ndarray) -> Any:
        return jax.device_get(jax.jit(functools.partial(model.apply, method=method))(restored.variables, x))

    found = {}
    expected = (images, apply("encode", images)), (codes, [apply("decode", codes).mean])
    for (name, function), (given, wanted) in zip(functions.items(), expected, strict=True):
        outputs = function(given)
        same = [np.shape(array) for array in outputs] == [array.shape for array in wanted]
        largest = max(float(np.max(np.abs(a - b))) for a, b in zip(outputs, wanted, strict=True)) if same else math.inf
        found[name] = Difference(largest, tolerance * max(1.0, *(float(np.max(np.abs(array))) for array in wanted)))
    return found
