"""`encoder.onnx` and `decoder.onnx`: the model as ONNX graphs, with the inputs and outputs of the StableHLO programs.

JAX traces the two functions; each operation that depends on the input becomes an ONNX operator, and the rest is
computed at once. So a model needs nothing here, unless it uses an operation that `OPERATORS` lacks. The graphs need
opset 17 (2022), take batches of any size, and compute in float32, whatever the model computes in.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import Jaxpr, Var
from onnx import helper, numpy_helper

import facevae_jax
from facevae_jax.core.errors import UserError
from facevae_jax.exporting import programs
from facevae_jax.trained.model import Restored

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
NAMES = {ENCODER: ("images", "mean", "log_variance"), DECODER: ("latents", "images")}  # the input, then the outputs
OPSET, IR_VERSION = 17, 8
LAYOUT = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO, NHWC
# Operations that are functions called once, and the parameter with the function.
CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}

Value = str | np.ndarray  # the name of an operator's output, or an array that does not depend on the input


def serialize_graphs(restored: Restored) -> dict[str, bytes]:
    """Contents of the two files, by name.

    Raises:
      UserError: the model uses an operation that has no ONNX operator here.
    """
    halves = programs.halves(in_float32(restored))
    with jax.default_matmul_precision("highest"):  # of what is computed at once
        return {name: _serialize(restored, name, *half) for name, half in zip(NAMES, halves, strict=True)}


def in_float32(restored: Restored) -> Restored:
    """The model, computing in float32."""
    model: Any = restored.config.model
    if not hasattr(model, "dtype"):
        return restored
    config = dataclasses.replace(restored.config, model=dataclasses.replace(model, dtype="float32"))
    return restored._replace(config=config)


def _serialize(restored: Restored, file: str, function: Callable[..., Any], argument: jax.ShapeDtypeStruct) -> bytes:
    entry, *results = NAMES[file]
    graph = _Graph(entry, argument.shape[0])
    traced = jax.make_jaxpr(function)(argument)
    for value, name in zip(graph.run(traced.jaxpr, traced.consts, [entry]), results, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name(value)], [name], name=name))
    nodes, constants = graph.pruned(results)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            file.removesuffix(".onnx"),
            [_describe(entry, argument)],
            [_describe(name, value) for name, value in zip(results, traced.out_avals, strict=True)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="facevae_jax",
        producer_version=facevae_jax.__version__,
    )
    helper.set_model_props(model, {"step": str(restored.step), "config": json.dumps(restored.config.to_dict())})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _describe(name: str, value: Any) -> Any:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)


class _Graph:
    """Operators, in order, and the constants that they use."""

    def __init__(self, entry: str, batch: Any) -> None:
        self.entry, self.batch = entry, batch  # the input's name, and its first size, which is symbolic
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.convolutions: dict[str, _Convolution] = {}  # by the name of their output

    def run(self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """The values that a traced function returns for those of its arguments."""
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)

        def read(atom: Any) -> Value:
            return values[atom] if isinstance(atom, Var) else np.asarray(atom.val, atom.aval.dtype)

        for equation in jaxpr.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[Value]) -> Sequence[Value]:
        operation = equation.primitive
        inner = equation.params.get(CALLS.get(operation.name))
        name = equation.params.get("name", operation.name) if inner else operation.name
        if inner and name not in OPERATORS:
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        if name == "stop_gradient":
            return inputs
        if not any(isinstance(value, str) for value in inputs) and self.batch not in equation.outvars[0].aval.shape:
            found = operation.bind(*map(jnp.asarray, inputs), **equation.params)
            return list(map(np.asarray, found if operation.multiple_results else [found]))
        if name not in OPERATORS:
            raise UserError(f"--onnx: the model's {name} has no ONNX operator here: leave --onnx out.")
        found = OPERATORS[name](self, equation, *inputs)
        return found if isinstance(found, list) else [found]

    def add(self, operator: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """The name of an operator's output, or the names of several."""
        names = [f"{operator}_{len(self.nodes)}_{index}" for index in range(outputs)]
        named = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, named, names, name=names[0], **attributes))
        return names if outputs > 1 else names[0]

    def name(self, value: Value) -> str:
        """The value's name; an array becomes a constant of the graph."""
        if isinstance(value, str):
            return value
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    def pruned(self, outputs: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """The operators and constants that the outputs need; the moments of batch normalization are not."""
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        constants = [numpy_helper.from_array(a, name) for name, a in self.constants.items() if name in needed]
        return nodes[::-1], constants


def _same(operator: str) -> Callable[..., Any]:
    """An operator that is the operation, without attributes."""
    return lambda graph, equation, *inputs: graph.add(operator, *inputs)


def _cast(graph: _Graph, equation: Any, x: Value) -> str:
    return graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"])))


def _reshape(graph: _Graph, equation: Any, x: Value) -> str:
    return graph.add("Reshape", x, _fixed(equation.outvars[0].aval.shape))


def _fixed(sizes: Sequence[Any]) -> np.ndarray:
    """For `Reshape`, which finds one size by itself."""
    return np.array([size if isinstance(size, int) else -1 for size in sizes], np.int64)


def _broadcast_in_dim(graph: _Graph, equation: Any, x: Value) -> Any:
    sizes, axes = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    before = dict(zip(axes, equation.invars[0].aval.shape, strict=True))
    aligned = [before.get(axis, 1) for axis in range(len(sizes))]
    x = graph.add("Reshape", x, _fixed(aligned))
    if aligned == list(sizes):
        return x
    batch = graph.add("Shape", graph.entry, start=0, end=1)
    shape = [np.array([size], np.int64) if isinstance(size, int) else batch for size in sizes]
    return graph.add("Expand", x, graph.add("Concat", *shape, axis=0))


def _transpose(graph: _Graph, equation: Any, x: Value) -> str:
    return graph.add("Transpose", x, perm=equation.params["permutation"])


def _split(graph: _Graph, equation: Any, x: Value) -> list[str]:
    sizes = np.array(equation.params["sizes"], np.int64)
    return graph.add("Split", x, sizes, outputs=len(sizes), axis=equation.params["axis"])


def _select_n(graph: _Graph, equation: Any, which: Value, false: Value, true: Value) -> str:
    return graph.add("Where", which, true, false)


def _dot_general(graph: _Graph, equation: Any, left: Value, right: Value) -> str:
    (contracted, batched), last = equation.params["dimension_numbers"], equation.invars[0].aval.ndim - 1
    if contracted != ((last,), (0,)) or batched != ((), ()):
        raise UserError(f"--onnx: dot_general of {contracted}, {batched} has no ONNX operator here: leave --onnx out.")
    return graph.add("MatMul", left, right)


class _Convolution(NamedTuple):
    """`Conv` or `ConvTranspose` of an input in NHWC; a runtime does not merge what follows the latter."""

    operator: str
    x: Value
    kernel: np.ndarray
    bias: np.ndarray
    attributes: dict[str, Any]

    def add_to(self, graph: _Graph) -> str:
        """Its output, in NHWC."""
        x = graph.add("Transpose", self.x, perm=[0, 3, 1, 2])
        y = graph.add(self.operator, x, self.kernel, self.bias, **self.attributes)
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        graph.convolutions[y] = self
        return y

    def then(self, operator: str, constant: np.ndarray) -> "_Convolution":
        """The same, with a number for each channel added to it or multiplied by it."""
        if operator == "Add":
            return self._replace(bias=self.bias + constant)
        places = (1, -1, 1, 1) if self.operator == "ConvTranspose" else (-1, 1, 1, 1)
        return self._replace(kernel=self.kernel * constant.reshape(places), bias=self.bias * constant)


def _convolution(graph: _Graph, equation: Any, x: Value, kernel: np.ndarray) -> str:
    """In ONNX a convolution of a dilated input is a transposed one."""
    parameters = equation.params
    kernel, strides, operator = kernel.transpose(3, 2, 0, 1), parameters["window_strides"], "Conv"  # HWIO to OIHW
    before, after = np.array(parameters["padding"]).T
    if parameters["lhs_dilation"] != (1, 1):
        kernel, strides, operator = kernel.swapaxes(0, 1)[..., ::-1, ::-1], parameters["lhs_dilation"], "ConvTranspose"
        before, after = (np.array(kernel.shape[2:]) - 1 - padding for padding in (before, after))
    others = [parameters[name] for name in ("feature_group_count", "batch_group_count", "rhs_dilation")]
    plain = [parameters["dimension_numbers"], *others] == [LAYOUT, 1, 1, (1, 1)]
    if (
        not plain
        or (1, 1) not in (parameters["window_strides"], parameters["lhs_dilation"])
        or min(*before, *after) < 0
    ):
        raise UserError("--onnx: a convolution of this kind has no ONNX operator here: leave --onnx out.")
    attributes = {"kernel_shape": kernel.shape[2:], "strides": strides, "pads": [*before, *after]}
    bias = np.zeros(equation.outvars[0].aval.shape[-1], np.float32)
    return _Convolution(operator, x, kernel, bias, attributes).add_to(graph)


def _affine(operator: str) -> Callable[..., Any]:
    """An addition or a multiplication, which a convolution before it takes into its kernel and bias."""

    def convert(graph: _Graph, equation: Any, *inputs: Value) -> str:
        for x, y in (inputs, inputs[::-1]):
            before = graph.convolutions.get(x) if isinstance(x, str) else None
            if before and isinstance(y, np.ndarray) and y.shape == (1, 1, 1, before.bias.size):
                return before.then(operator, y.ravel()).add_to(graph)
        return graph.add(operator, *inputs)

    return convert


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": _affine("Add"),
    "broadcast_in_dim": _broadcast_in_dim,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "div": _same("Div"),
    "dot_general": _dot_general,
    "exp": _same("Exp"),
    "ge": _same("GreaterOrEqual"),
    "gt": _same("Greater"),
    "integer_pow": lambda graph, equation, x: graph.add("Pow", x, np.array(equation.params["y"], np.float32)),
    "leaky_relu": lambda graph, equation, x, slope: graph.add("LeakyRelu", x, alpha=float(slope)),  # of models.layers
    "log": _same("Log"),
    "logistic": _same("Sigmoid"),
    "max": _same("Max"),
    "min": _same("Min"),
    "mul": _affine("Mul"),
    "reduce_max": lambda graph, equation, x: graph.add("ReduceMax", x, axes=equation.params["axes"], keepdims=0),
    "reduce_sum": lambda graph, equation, x: graph.add("ReduceSum", x, np.array(equation.params["axes"]), keepdims=0),
    "reshape": _reshape,
    "rsqrt": lambda graph, equation, x: graph.add("Reciprocal", graph.add("Sqrt", x)),
    "select_n": _select_n,
    "split": _split,
    "square": lambda graph, equation, x: graph.add("Mul", x, x),
    "sub": _same("Sub"),
    "tanh": _same("Tanh"),
    "transpose": _transpose,
}
