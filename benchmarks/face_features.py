"""Features of faces for Fréchet distances: `--features=benchmarks.face_features:attributes`.

They are the last hidden layer of a classifier of CelebA's 40 attributes at 64x64, trained in minutes on the training
split and cached; a thousand images a second. Samples are compared with another split.

`dlib`: dlib's 29-layer residual network for face recognition (King 2017), 128 features; about 10 images a second and
core. `pip install dlib-bin face_recognition_models` brings the weights (CC0). Its input is a square of 150 pixels with
an upright face, as in CelebA's and FFHQ's crops, enlarged by a bicubic filter.
"""

import functools
import importlib.util
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, UInt8
from PIL import Image

from benchmarks.networks import encoder, fit, in_batches
from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError
from facevae_jax.core.files import atomic_writer
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.store import gather_rows
from facevae_jax.models.api import to_unit

DLIB_SIDE, DLIB_WEIGHTS = 150, "models/dlib_face_recognition_resnet_model_v1.dat"  # pixels of its input
SIDE, FEATURES, FILTERS = 64, 128, (32, 64, 128, 128)
EPOCHS, BATCH_SIZE = 6, 128
CACHE = pathlib.Path("~/.cache/facevae_jax").expanduser()


@functools.cache
def _dlib_network() -> Any:
    found = importlib.util.find_spec("face_recognition_models")  # not imported: it needs an old setuptools
    if not found or not found.origin or not importlib.util.find_spec("dlib"):
        raise UserError("benchmarks.face_features needs: pip install dlib-bin face_recognition_models")
    import dlib

    return dlib.face_recognition_model_v1(str(pathlib.Path(found.origin).parent / DLIB_WEIGHTS))


def dlib(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 128"]:
    """dlib's descriptors of faces."""
    size = (DLIB_SIDE, DLIB_SIDE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return np.array(_dlib_network().compute_face_descriptor(large, 0))


class Classifier(nn.Module):
    """Faces to the logits of attributes, with a last hidden layer of `FEATURES` units."""

    classes: int

    def setup(self) -> None:  # noqa: D102
        self.encoder = encoder(FEATURES, FILTERS)
        self.head = nn.Dense(self.classes)

    def features(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b f"]:
        """The last hidden layer."""
        return nn.silu(self.encoder(images, None, train=False).mean)

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b a"]:  # noqa: D102
        return self.head(self.features(images))


def attributes(images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n f"]:
    """The attribute network's features of faces."""
    if images.shape[1:] != (SIDE, SIDE, 3):
        raise UserError(f"images of shape {list(images.shape[1:])}: this network takes {SIDE}x{SIDE}.")
    return in_batches(_attribute_network("features"), images)


def attribute_logits(images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n a"]:
    """The attribute network's logits of CelebA's 40 attributes, in the order of the labels."""
    return in_batches(_attribute_network("__call__"), images)


@functools.cache
def _attribute_network(method: str) -> Callable[[Any], Array]:
    """A compiled method of the network; trains it if it is not in the cache."""
    dataset = open_dataset(DataConfig(name="celeba", resolution=SIDE))
    labels = dataset.labels("train").values
    network = Classifier(labels.shape[1])
    # The name has a checksum of the labels, as another training split gives another network.
    cached = CACHE / f"celeba_attribute_network_{SIDE}_{zlib.crc32(labels.tobytes()):08x}.npz"
    if not cached.exists():
        params = train(network, dataset.images("train"), labels)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(cached) as file:
            np.savez(file, **flatten_dict(params, sep="/"))
    with np.load(cached) as file:
        params = unflatten_dict(dict(file), sep="/")
    return jax.jit(lambda images: network.apply({"params": params}, images, method=method))


def train(network: Classifier, pixels: UInt8[np.ndarray, "n h w c"], labels: Float[np.ndarray, "n a"]) -> Any:
    """Trains on cross-entropy by Adam with mirrored images; returns the parameters."""
    steps, draw = EPOCHS * len(pixels) // BATCH_SIZE, np.random.default_rng(0)
    params: Any = network.init(jax.random.key(0), jnp.zeros((1, *pixels.shape[1:]), jnp.uint8))["params"]
    rows = (np.sort(draw.choice(len(pixels), BATCH_SIZE, replace=False)) for _ in range(steps))

    def loss(params: Any, key: Array, images: Array, targets: Array) -> Array:
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        logits: Any = network.apply({"params": params}, to_unit(jnp.where(mirrored, images[:, :, ::-1], images)))
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))

    params, value = fit(params, loss, ((gather_rows(pixels, batch), labels[batch]) for batch in rows), steps=steps)
    print(f"a network for CelebA's attributes: cross-entropy {value:.3f} at the end of training")
    return params
