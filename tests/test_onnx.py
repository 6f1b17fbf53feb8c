"""ONNX graphs give what the model gives."""

import json
import sys

import numpy as np
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.exporting import publishing
from facevae_jax.models.layers import ACTIVATIONS
from tests.conftest import change
from tests.scattered import expected, inputs, scattered_model

NO_ONNX = "needs the extra `onnx`"


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


def test_onnx_without_its_extra_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"\[onnx\]"):
        publishing.export(scattered_model(tiny_config), tmp_path / "out", onnx=True)
