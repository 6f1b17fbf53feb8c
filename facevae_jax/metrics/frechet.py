"""Distances between two sets of images by features of a network: Frechet (as in FID) and kernel (as in KID)."""

import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

from facevae_jax.core.errors import UserError

Extractor = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]
KERNEL_IMAGES = 5_000  # of each set, at most: the kernel distance needs a matrix of all pairs


def named_extractor(name: str) -> Extractor:
    """The function at `package.module:function`, from uint8 images [n, h, w, 3] to features [n, d].

    Raises:
      UserError: there is no such function.
    """
    remedy = "give the importable path of a function, such as my_package.my_module:features"
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:  # the last one: relative and empty names
        raise UserError(f"--features={name!r} cannot be imported ({error}): {remedy}.") from error
    if not callable(found):
        raise UserError(f"--features={name!r} is of type {type(found).__name__}: {remedy}.")
    return found


def features_of(extract: Extractor, batches: Iterable[UInt8[np.ndarray, "b h w 3"]]) -> Float64[np.ndarray, "n d"]:
    """Features of images that come in batches.

    Raises:
      UserError: the function does not return a row of finite numbers for each image.
    """
    rows = []
    for images in batches:
        given = np.asarray(extract(images))
        if given.ndim != 2 or len(given) != len(images) or not np.isfinite(given).all():
            raise UserError(
                f"--features returned shape {list(given.shape)} for {len(images)} images: it must return finite "
                f"numbers of shape [{len(images)}, d]."
            )
        rows.append(given.astype(np.float64))
    return np.concatenate(rows)


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of the Gaussians fitted to two sets of features (Dowson & Landau
    1982; Heusel et al. 2017).

    The trace of the root comes from the eigenvalues of the symmetric C_a^½ C_b C_a^½, which are those of C_a C_b, so
    that singular covariances give no complex numbers.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    covariance_a, covariance_b = (np.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root
    return float(max(distance, 0.0))


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (xᵀy / d + 1)³ (Binkowski et al. 2018, eq. 4).

    Unlike the Frechet distance it is unbiased for any number of images, so it may be slightly below 0.
    """
    a, b = a[:KERNEL_IMAGES], b[:KERNEL_IMAGES]

    def kernel(x: Any, y: Any) -> Any:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def mean_of_pairs(x: Any) -> Any:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2.0 * kernel(a, b).mean())
