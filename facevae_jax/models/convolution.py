"""Strided and transposed 3x3 convolutions of stride 2, in the form that suits the platform.

Both forms have the same parameters (those of `nn.Conv` and `nn.ConvTranspose(transpose_kernel=True)`) and the same
results up to rounding, so a checkpoint moves between platforms. `plain` is XLA's own convolution. `matmul` exists
because XLA on CPU lowers every dilated convolution (a transposed one, and the input gradient of a strided one) to a
slow generic path: it gathers patches by slicing and leaves the arithmetic to one matrix product.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Form = Literal["plain", "matmul"]
KERNEL = 3
STRIDE = 2
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def choose_form(form: Literal["auto", "plain", "matmul"]) -> Form:
    """Resolves `auto` for the platform that jax computes on."""
    if form != "auto":
        return form
    return "matmul" if jax.default_backend() == "cpu" else "plain"


def strided_convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"], *, form: Form
) -> Float[Array, "b h/2 w/2 f"]:
    """3x3 convolution with stride 2 and SAME padding (none before, one after); h and w are even."""
    if form == "plain":
        return lax.conv_general_dilated(x, kernel, (STRIDE, STRIDE), "SAME", dimension_numbers=_LAYOUT)
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    taps = [
        padded[:, row : row + height - 1 : STRIDE, column : column + width - 1 : STRIDE, :]
        for row in range(KERNEL)
        for column in range(KERNEL)
    ]
    patches = jnp.concatenate(taps, axis=-1)
    return patches @ kernel.reshape(KERNEL * KERNEL * channels, -1)


def transposed_convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 f c"], *, form: Form
) -> Float[Array, "b 2h 2w f"]:
    """The transpose of `strided_convolution` with respect to its input: 3x3, stride 2, SAME.

    With no padding before, output row 2i is x[i] k[0] + x[i-1] k[2] and row 2i+1 is x[i] k[1], and so for columns. All
    four (row, column) parities are therefore one matrix product of 2x2 patches with a kernel of 4 x 4 blocks, nine of
    them not zero, followed by depth-to-space.
    """
    if form == "plain":
        return lax.conv_transpose(x, kernel, (STRIDE, STRIDE), "SAME", dimension_numbers=_LAYOUT, transpose_kernel=True)
    batch, height, width, _ = x.shape
    features = kernel.shape[2]
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    # Rows then columns, the current one before the previous one, in the order of `_sub_pixel_kernel`.
    taps = [padded[:, row : row + height, column : column + width, :] for row in (1, 0) for column in (1, 0)]
    patches = jnp.concatenate(taps, axis=-1)
    pixels = patches @ _sub_pixel_kernel(kernel)
    pixels = pixels.reshape(batch, height, width, STRIDE, STRIDE, features)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, STRIDE * height, STRIDE * width, features)


def _sub_pixel_kernel(kernel: Float[Array, "3 3 f c"]) -> Float[Array, "4c 4f"]:
    """The 3x3 kernel as a matrix from (previous row?, previous column?, c) to (odd row?, odd column?, f)."""
    zero = jnp.zeros_like(kernel[0, 0])

    def tap(previous: int, odd: int) -> int | None:
        """Index along one side of the kernel that leads from an input to an output parity."""
        return {(0, 0): 0, (1, 0): 2, (0, 1): 1}.get((previous, odd))

    rows = []
    for previous_row in (0, 1):
        for previous_column in (0, 1):
            blocks = []
            for odd_row in (0, 1):
                for odd_column in (0, 1):
                    row, column = tap(previous_row, odd_row), tap(previous_column, odd_column)
                    blocks.append((zero if row is None or column is None else kernel[row, column]).T)
            rows.append(jnp.concatenate(blocks, axis=1))
    return jnp.concatenate(rows, axis=0)


def _bias(bias: Float[Array, " f"], *, train: bool) -> Float[Array, " f"]:
    """The bias, held at its initial value unless it is trained.

    Batch normalisation after a convolution subtracts the bias again, so its true gradient is zero. What reverse mode
    computes instead is rounding noise, which Adam would scale up to full steps: a random walk that depends on the
    number of devices and that the running mean follows too late.
    """
    return bias if train else lax.stop_gradient(bias)


class StridedConvolution(nn.Module):
    """Halves height and width; parameters as `nn.Conv(features, (3, 3), strides=2)`."""

    features: int
    form: Form
    dtype: jnp.dtype
    train_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 f"]:  # noqa: D102
        shape = (KERNEL, KERNEL, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        bias = _bias(self.param("bias", nn.initializers.zeros, (self.features,)), train=self.train_bias)
        return strided_convolution(x, kernel.astype(self.dtype), form=self.form) + bias.astype(self.dtype)


class TransposedConvolution(nn.Module):
    """Doubles height and width; parameters as `nn.ConvTranspose(..., (3, 3), strides=2, transpose_kernel=True)`."""

    features: int
    form: Form
    dtype: jnp.dtype
    train_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w f"]:  # noqa: D102
        shape = (KERNEL, KERNEL, self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        bias = _bias(self.param("bias", nn.initializers.zeros, (self.features,)), train=self.train_bias)
        return transposed_convolution(x, kernel.astype(self.dtype), form=self.form) + bias.astype(self.dtype)
