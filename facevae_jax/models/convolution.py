"""Convolutions of stride 1 and 2 and transposed ones of stride 2, in the form that suits the platform.

Both forms have the parameters of `nn.Conv` and `nn.ConvTranspose(transpose_kernel=True)` and the same results up to
rounding, so a checkpoint moves between platforms. `plain` is XLA's own convolution. `matmul` exists because XLA on CPU
lowers every dilated convolution (a transposed one, and the input gradient of a strided one) and every kernel gradient
to a slow generic path: it leaves these to matrix products, of patches that `blocks` keeps small enough for the cache.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from facevae_jax.models.blocks import FEW_CHANNELS

Form = Literal["plain", "matmul"]
STRIDE = 2
_TERMS = 4  # products sum a multiple of so many numbers of a patch: 27 take half as long again as 28
_WIDTH = 16  # a transposed convolution's product gives rows of a multiple of so many: 27 take half as long again as 32
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def choose_form(form: Literal["auto", "plain", "matmul"], platform: str | None = None) -> Form:
    """Resolves `auto` for a platform, by default the one that jax computes on."""
    if form != "auto":
        return form
    return "matmul" if (platform or jax.default_backend()) == "cpu" else "plain"


def convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], *, stride: int, form: Form
) -> Float[Array, "b h2 w2 f"]:
    """Convolution with SAME padding, as `nn.Conv`: of stride 1 (k is odd), or 2 (h and w are even, k is at least 2)."""
    if form == "plain":
        return _plain(x, kernel, stride)
    return _strided(x, kernel) if stride == STRIDE else _same(x, kernel)


def _plain(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], stride: int) -> Float[Array, "b h2 w2 f"]:
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=_LAYOUT)


def transposed_convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k f c"], *, form: Form
) -> Float[Array, "b 2*h 2*w f"]:
    """The transpose of `convolution` of stride 2 with respect to its input, as `nn.ConvTranspose`."""
    if form == "plain":
        return _plain_transposed(x, kernel)
    return _transposed(x, kernel)


def upsampled_convolution(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"], *, form: Form
) -> Float[Array, "b 2*h 2*w f"]:
    """Doubling by nearest neighbors, then `convolution` of stride 1 (k is odd), as one transposed convolution.

    A neighbor reaches an output through two taps next to each other in each axis, which are added up.
    """
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    taps = [jnp.pad(turned, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in range(2) for j in range(2)]
    return transposed_convolution(x, sum(taps[1:], taps[0]), form=form)


def space_to_depth(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c2"]:
    """Squares of `size` x `size` places become one place with size² times the channels."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height // size, size, width // size, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, height // size, width // size, size**2 * channels)


def depth_to_space(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, height, width, size, size, channels // size**2)
    return cut.swapaxes(2, 3).reshape(batch, size * height, size * width, channels // size**2)


@jax.custom_vjp
def _plain_transposed(x: Float[Array, "b h w c"], kernel: Float[Array, "k k f c"]) -> Float[Array, "b 2*h 2*w f"]:
    return lax.conv_transpose(x, kernel, (STRIDE, STRIDE), "SAME", dimension_numbers=_LAYOUT, transpose_kernel=True)


def _plain_transposed_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """From the strided convolution whose transpose it is.

    Derived automatically, the kernel's gradient reverses and dilates whole activations: on a TPU a quarter of a step,
    and on a GPU convolutions with filters as large as the image.
    """
    x, kernel = residuals
    of_x, pull_back = jax.vjp(functools.partial(convolution, gradient, stride=STRIDE, form="plain"), kernel)
    return of_x, pull_back(x)[0]


_plain_transposed.defvjp(lambda x, kernel: (_plain_transposed(x, kernel), (x, kernel)), _plain_transposed_gradients)


# Each is the other's derivative by its input. Derived automatically, the gradient of `_patches` would be k x k dilated
# arrays in memory, added up.


@jax.custom_vjp
def _strided(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"]) -> Float[Array, "b h2 w2 f"]:
    return _patches(x, kernel.shape[0], terms=_TERMS) @ _matrix(kernel, terms=_TERMS)


@jax.custom_vjp
def _transposed(x: Float[Array, "b h w c"], kernel: Float[Array, "k k f c"]) -> Float[Array, "b 2*h 2*w f"]:
    patches = x @ _matrix(kernel, terms=_WIDTH).T
    return _overlap_add(patches[..., : math.prod(kernel.shape[:-1])], kernel.shape[0])


def _strided_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_kernel = _kernel_gradient(_patches(x, kernel.shape[0]), gradient)
    return _transposed(gradient, kernel), of_kernel.reshape(kernel.shape)


def _transposed_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    patches = _patches(gradient, kernel.shape[0], terms=_TERMS)  # serve both gradients
    of_kernel = _kernel_gradient(patches, x)[: math.prod(kernel.shape[:-1])]
    return patches @ _matrix(kernel, terms=_TERMS), of_kernel.reshape(kernel.shape)


@jax.custom_vjp
def _same(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c f"]) -> Float[Array, "b h w f"]:
    """Of stride 1: XLA's own but for the kernel's gradient."""
    return x @ kernel[0, 0] if kernel.shape[0] == 1 else _plain(x, kernel, 1)


def _same_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_kernel = _kernel_gradient(_patches(x, kernel.shape[0], stride=1), gradient)
    # The transpose of a convolution of stride 1 is one with the kernel turned around.
    return _same(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), of_kernel.reshape(kernel.shape)


_strided.defvjp(lambda x, kernel: (_strided(x, kernel), (x, kernel)), _strided_gradients)
_same.defvjp(lambda x, kernel: (_same(x, kernel), (x, kernel)), _same_gradients)
_transposed.defvjp(lambda x, kernel: (_transposed(x, kernel), (x, kernel)), _transposed_gradients)


def _matrix(kernel: Float[Array, "k k c f"], *, terms: int = 1) -> Float[Array, "p f"]:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jnp.pad(matrix, ((0, -len(matrix) % terms), (0, 0)))


def _kernel_gradient(patches: Float[Array, "b h w p"], y: Float[Array, "b h w f"]) -> Float[Array, "p f"]:
    """Sum over b, h and w of the outer products.

    XLA's fast product takes no left operand that is transposed, so the narrower operand is transposed first. Without
    the barrier XLA would turn the product around again.
    """
    y, patches = (a.reshape(-1, a.shape[-1]) for a in (y, patches))
    if y.shape[1] > patches.shape[1]:
        return _transpose(patches) @ y
    return lax.optimization_barrier(_transpose(y) @ patches).T


def _transpose(matrix: Float[Array, "n m"]) -> Float[Array, "m n"]:
    """The transpose, read from the matrix in memory.

    XLA would otherwise compute the matrix again, number by number in the order of the transpose, which takes up to four
    times as long. It does not move what a conditional reads into its branches, which here are the same.
    """
    return lax.cond(matrix[0, 0] >= 0, jnp.transpose, jnp.transpose, matrix)


def _patches(
    x: Float[Array, "b h w c"], size: int, *, stride: int = STRIDE, terms: int = 1
) -> Float[Array, "b h2 w2 p"]:
    """What each output of a convolution sees: rows, then columns, then channels, as in the kernel.

    Zeros follow up to a multiple of `terms` numbers.
    """
    batch, height, width, channels = x.shape
    height, width = height // stride, width // stride
    before = (size - stride) // 2  # of SAME's padding; one more row may come after
    after = size - stride - before
    columns = (before, after + -size % stride)
    # Neighboring columns are neighbors in the kernel as well, so the columns of one stride are written as one part.
    if channels <= FEW_CHANNELS and before % stride == 0:  # padding in loops over 3 takes three times as long
        x, columns = x.reshape(batch, x.shape[1], -1, stride * channels), (before // stride, columns[1] // stride)
    padded = jnp.pad(x, ((0, 0), (before, after), columns, (0, 0)))
    padded = padded.reshape(*padded.shape[:2], -1, stride * channels)
    numbers = size**2 * channels
    # XLA writes each part in place. Parts of a concatenation would first be arrays of their own, and patches of another
    # shape than the product reads would be copied.
    patches = jnp.zeros((batch * height * width, numbers + -numbers % terms), x.dtype)
    for row in range(size):
        for column in range(0, size, stride):
            first, together = column // stride, min(stride, size - column) * channels
            seen = padded[:, row : row + stride * height - stride + 1 : stride, first : first + width, :together]
            place = (row * size + column) * channels
            patches = lax.dynamic_update_slice(patches, seen.reshape(len(patches), together), (0, place))
    return patches.reshape(batch, height, width, -1)


def _overlap_add(patches: Float[Array, "b h w p"], size: int) -> Float[Array, "b 2*h 2*w f"]:
    """The transpose of `_patches`: adds up what each input of a strided convolution gave to.

    Tap t of position i belongs to row 2 i + t - before = 2 (i + shift) + parity, and so for columns: each of the four
    (row, column) parities is a sum of shifted taps. They are written in turn: XLA would compute a concatenation of them
    number by number where it is read.
    """
    batch, height, width, _ = patches.shape
    patches = patches.reshape(batch, height, width, size, size, -1)
    before = (size - STRIDE) // 2
    taps = [divmod(tap - before, STRIDE) for tap in range(size)]  # (shift, parity)
    pixels = jnp.zeros((batch, height, STRIDE, width, STRIDE, patches.shape[-1]), patches.dtype)
    for row_parity in range(STRIDE):
        for column_parity in range(STRIDE):
            terms = [
                _shift(patches[:, :, :, i, j], rows, columns)
                for i, (rows, parity_i) in enumerate(taps)
                for j, (columns, parity_j) in enumerate(taps)
                if (parity_i, parity_j) == (row_parity, column_parity)
            ]
            parity = sum(terms[1:], terms[0])[:, :, None, :, None]
            pixels = lax.dynamic_update_slice(pixels, parity, (0, 0, row_parity, 0, column_parity, 0))
    return pixels.reshape(batch, STRIDE * height, STRIDE * width, -1)


def _shift(x: Float[Array, "b h w f"], rows: int, columns: int) -> Float[Array, "b h w f"]:
    """Moves down by `rows` and right by `columns`; what leaves is dropped, and zeros come in."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (rows, -rows, 0), (columns, -columns, 0), (0, 0, 0)))
