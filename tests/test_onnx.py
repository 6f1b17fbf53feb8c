"""ONNX graphs give what the model gives."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.exporting import onnx_graphs, publishing
from facevae_jax.models import autoencoder, layers, pca, vae
from tests.conftest import change
from tests.scattered import expected, inputs, scattered_model

MODELS = {
    "batch": vae.Config(latent_dim=8, filters=(12, 16, 24)),
    "batch-4": vae.Config(latent_dim=8, filters=(12, 16, 24), kernel_size=4, activation="gelu"),
    "group-5": vae.Config(latent_dim=8, filters=(12, 16, 24), kernel_size=5, normalization="group", activation="silu"),
    "none": vae.Config(latent_dim=8, filters=(12, 16), normalization="none", activation="relu"),
    "autoencoder": vae.Config(kind="autoencoder", latent_dim=8, filters=(12, 16)),
    "spatial-8": autoencoder.Config(width=16),
    "spatial-4": autoencoder.Config(width=16, downsampling=4, activation="leaky_relu", blocks=2),
    "pca": pca.Config(latent_dim=8),
}


@pytest.mark.parametrize("model", MODELS)
def test_onnx_gives_what_the_model_gives(tiny_config, model):
    restored = scattered_model(dataclasses.replace(tiny_config, model=MODELS[model]))
    files = onnx_graphs.serialize_graphs(restored)
    encoder, decoder = (onnxruntime.InferenceSession(files[n]) for n in (onnx_graphs.ENCODER, onnx_graphs.DECODER))
    images, latents = inputs(5, restored.config)
    posterior, decoded = expected(restored, images, latents)
    named = getattr(MODELS[model], "activation", "") == "leaky_relu"
    assert (b"LeakyRelu" in files[onnx_graphs.DECODER]) == named  # one operation, and not four
    for count in (1, 5):
        outputs = encoder.run(["mean", "log_variance"], {"images": images[:count]})
        for found, wanted in zip(outputs, posterior, strict=True):
            np.testing.assert_allclose(found, wanted[:count], rtol=1e-4, atol=1e-4, strict=True)
        outputs = decoder.run(None, {"latents": latents[:count]})
        np.testing.assert_allclose(outputs[0], decoded[:count], atol=1e-4, strict=True)


def half(x):  # a loop
    return jax.lax.fori_loop(0, 2, lambda _, y: y / 2, x)


@pytest.mark.parametrize(("operation", "name"), [(jnp.sort, "sort"), (half, "scan")])
def test_an_operation_without_an_operator_is_refused(tiny_config, monkeypatch, operation, name):
    monkeypatch.setattr(layers.lax, "rsqrt", operation)
    model = scattered_model(change(tiny_config, model={"normalization": "group"}))
    with pytest.raises(UserError, match=f"{name} has no ONNX operator"):
        onnx_graphs.serialize_graphs(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onnx_is_exported_and_compared(tiny_config, tmp_path, dtype):
    restored = scattered_model(change(tiny_config, model={"dtype": dtype}))
    differences = publishing.export(restored, tmp_path / "out", onnx=True)
    assert set(differences) == {"encoder.stablehlo", "decoder.stablehlo", "encoder.onnx", "decoder.onnx"}
    recorded = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert recorded["decoder.onnx"]["max_abs_difference"] == differences["decoder.onnx"].largest < 1e-5


def test_onnx_without_its_extra_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"\[onnx\]"):
        publishing.export(scattered_model(tiny_config), tmp_path / "out", onnx=True)
