"""`encoder.onnx` and `decoder.onnx`: the model as ONNX graphs, with the inputs and outputs of the StableHLO programs.

The graphs are built operator by operator from the parameters, in float32 whatever the model computes in, for batches of
any size. They need opset 17 (2022). Images are NHWC outside, as
everywhere in this project, and NCHW inside, as ONNX's convolutions need them.
"""

import json
import math
from typing import Any

import jax
import numpy as np
import onnx
from jaxtyping import Float32
from onnx import TensorProto, helper, numpy_helper

import facevae_jax
from facevae_jax.core.settings import CHANNELS
from facevae_jax.models import vae
from facevae_jax.models.api import LOG_VARIANCE_RANGE
from facevae_jax.models.convolution import STRIDE
from facevae_jax.models.layers import BATCH_NORM_EPSILON, GROUP_NORM_EPSILON, GROUP_SIZE, LEAKY_RELU_SLOPE
from facevae_jax.models.likelihoods import LogisticLikelihood
from facevae_jax.trained.model import Restored
from facevae_jax.training.setup import make_model

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
OPSET, IR_VERSION = 17, 8
BATCH = "b"


def serialize_graphs(restored: Restored) -> dict[str, bytes]:
    """Contents of the two files, by name."""
    variables = jax.device_get(restored.variables)
    models = {ENCODER: _encoder(restored, variables), DECODER: _decoder(restored, variables)}
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
    return {name: model.SerializeToString() for name, model in models.items()}


class _Graph:
    """Operators and constants, in order."""

    def __init__(self, config: vae.Config, variables: Any, part: str) -> None:
        self.config = config
        self.params = variables["params"][part]
        self.batch_stats = variables["batch_stats"].get(part, {})
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """The name of an operator's output."""
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def dense(self, x: str, kernel: Float32[np.ndarray, "i o"], bias: Float32[np.ndarray, " o"], **names: str) -> str:
        return self.add("Gemm", x, self.constant(kernel), self.constant(bias), **names)

    def convolution(self, x: str, name: str) -> str:
        """A layer of stride 2 with SAME padding: of an odd padding the larger half comes after."""
        layer, size = self.params[name], self.config.kernel_size
        before = (size - STRIDE) // 2
        after = size - STRIDE - before
        kernel = self.constant(np.transpose(layer["kernel"], (3, 2, 0, 1)))  # HWIO to OIHW, transposed or not
        return self.add(
            "ConvTranspose" if name.startswith("Transposed") else "Conv",
            x,
            kernel,
            self.constant(layer["bias"]),
            kernel_shape=[size, size],
            strides=[STRIDE, STRIDE],
            pads=[before, before, after, after],
        )

    def stage(self, x: str, index: int, *, channels: int, side: int) -> str:
        """Normalization and activation after a hidden convolution; there is no dropout in evaluation."""
        if self.config.normalization == "batch":
            norm = self.params[f"Stage_{index}"]["BatchNorm_0"]
            running = self.batch_stats[f"Stage_{index}"]["BatchNorm_0"]
            arrays = [norm["scale"], norm["bias"], running["mean"], running["var"]]
            x = self.add("BatchNormalization", x, *map(self.constant, arrays), epsilon=BATCH_NORM_EPSILON)
        elif self.config.normalization == "group":
            x = self._group_norm(x, self.params[f"Stage_{index}"]["GroupNorm_0"], channels=channels, side=side)
        return self._activation(x)

    def _group_norm(self, x: str, norm: Any, *, channels: int, side: int) -> str:
        """As instance normalization of groups: the operator GroupNormalization needs a newer opset."""
        groups = channels // math.gcd(GROUP_SIZE, channels)
        grouped = self.add("Reshape", x, self.constant([0, groups, -1], np.int64))  # 0: the batch as it is
        ones, zeros = self.constant(np.ones(groups)), self.constant(np.zeros(groups))
        normal = self.add("InstanceNormalization", grouped, ones, zeros, epsilon=GROUP_NORM_EPSILON)
        x = self.add("Reshape", normal, self.constant([0, channels, side, side], np.int64))
        scale, bias = (self.constant(norm[name].reshape(-1, 1, 1)) for name in ("scale", "bias"))
        return self.add("Add", self.add("Mul", x, scale), bias)

    def _activation(self, x: str) -> str:
        name = self.config.activation
        if name == "leaky_relu":
            return self.add("LeakyRelu", x, alpha=LEAKY_RELU_SLOPE)
        if name == "relu":
            return self.add("Relu", x)
        if name == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))
        if name == "gelu":  # the form with tanh, Flax's default
            cubic = self.add("Mul", self.add("Mul", x, x), x)
            inner = self.add("Add", x, self.add("Mul", cubic, self.constant(0.044715)))
            tanh = self.add("Tanh", self.add("Mul", inner, self.constant(math.sqrt(2 / math.pi))))
            half = self.add("Mul", x, self.constant(0.5))
            return self.add("Mul", half, self.add("Add", tanh, self.constant(1.0)))
        raise NotImplementedError(f"activation {name}")  # a new one has to be written here too

    def mixture_mean(self, x: str, components: int) -> str:
        """The mean of the distribution that the last layer describes; see `LogisticLikelihood.decode`."""

        def channels(x: str, first: int, count: int) -> str:
            ends = (self.constant([value], np.int64) for value in (first, first + count, 1))  # the last is the axis
            return self.add("Slice", x, *ends)

        size = components * CHANNELS
        means = self.add("Sigmoid", channels(x, 0, size))
        if components == 1:
            return means
        weights = self.add("Softmax", channels(x, 2 * size, components), axis=1)
        terms = (
            self.add("Mul", channels(means, k * CHANNELS, CHANNELS), channels(weights, k, 1)) for k in range(components)
        )
        return self.add("Sum", *terms)

    def model(self, restored: Restored, name: str, inputs: list[Any], outputs: list[Any]) -> Any:
        """The whole, checked by ONNX' own checker."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph,
            opset_imports=[opset],
            ir_version=IR_VERSION,
            producer_name="facevae_jax",
            producer_version=facevae_jax.__version__,
        )
        facts = {"step": str(restored.step), "config": json.dumps(restored.config.to_dict())}
        helper.set_model_props(model, facts)
        return model


def settings_of(restored: Restored) -> vae.Config:
    """The settings of the network, which must be that of `models.vae`."""
    assert isinstance(restored.config.model, vae.Config)
    return restored.config.model


def _encoder(restored: Restored, variables: Any) -> Any:
    config, side = settings_of(restored), restored.config.data.resolution
    graph = _Graph(config, variables, "encoder")
    pixels = helper.make_tensor_value_info("images", TensorProto.UINT8, [BATCH, side, side, CHANNELS])
    unit = graph.add("Div", graph.add("Cast", "images", to=TensorProto.FLOAT), graph.constant(255.0))
    x = graph.add("Transpose", unit, perm=[0, 3, 1, 2])
    filters = config.stage_filters(side)
    for index, channels in enumerate(filters):
        side //= STRIDE
        x = graph.convolution(x, f"StridedConvolution_{index}")
        x = graph.stage(x, index, channels=channels, side=side)
    x = graph.add("Flatten", x, axis=1)
    (size,) = make_model(restored.config)[0].code_shape
    shape = (side, side, filters[-1], size)
    heads = {}
    for name in ("mean", "log_variance"):
        kernel = graph.params[name]["kernel"].reshape(shape)  # rows in the order of NHWC, where x is NCHW
        heads[name] = kernel.transpose(2, 0, 1, 3).reshape(-1, size), graph.params[name]["bias"]
    graph.dense(x, *heads["mean"], output="mean")
    log_variance = graph.dense(x, *heads["log_variance"])
    graph.add("Clip", log_variance, *map(graph.constant, LOG_VARIANCE_RANGE), output="log_variance")
    vectors: list[str | int | None] = [BATCH, size]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, vectors) for name in heads]
    return graph.model(restored, "encoder", [pixels], outputs)


def _decoder(restored: Restored, variables: Any) -> Any:
    config, resolution = settings_of(restored), restored.config.data.resolution
    graph = _Graph(config, variables, "decoder")
    model, likelihood = make_model(restored.config)
    latents = helper.make_tensor_value_info("latents", TensorProto.FLOAT, [BATCH, *model.code_shape])
    filters = config.stage_filters(resolution)
    side, deepest = resolution // STRIDE ** len(filters), filters[-1]
    kernel, bias = (graph.params["Dense_0"][name].reshape(-1, side, side, deepest) for name in ("kernel", "bias"))
    kernel, bias = (array.transpose(0, 3, 1, 2).reshape(len(array), -1) for array in (kernel, bias))
    x = graph.dense("latents", kernel, bias[0])
    x = graph.add("Reshape", x, graph.constant([0, deepest, side, side], np.int64))
    for index, channels in enumerate(reversed(filters[:-1])):
        side *= STRIDE
        x = graph.convolution(x, f"TransposedConvolution_{index}")
        x = graph.stage(x, index, channels=channels, side=side)
    x = graph.convolution(x, f"TransposedConvolution_{len(filters) - 1}")
    if isinstance(likelihood, LogisticLikelihood):
        x = graph.mixture_mean(x, likelihood.components)
    else:
        x = graph.add("Sigmoid", x)
    graph.add("Transpose", x, perm=[0, 2, 3, 1], output="images")
    shape: list[str | int | None] = [BATCH, resolution, resolution, CHANNELS]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    return graph.model(restored, "decoder", [latents], [images])
