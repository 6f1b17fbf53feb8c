"""Features of networks that know faces, for Frechet distances: `--features=benchmarks.face_features:attributes`.

`attributes`: the last hidden layer of a network that tells CelebA's 40 attributes, trained here in minutes and kept in
the cache; for 64x64 alone, a thousand images a second. It has seen the training split, not the one that samples are
compared with.

`dlib`: dlib's 29-layer residual network (King 2017), which tells people apart, 128 numbers a face; about 10 images a
second and core. `pip install dlib-bin face_recognition_models`, which holds the weights (CC0). It takes squares of 150
pixels that hold an upright face, as CelebA's and FFHQ's crops do, enlarged by a bicubic filter.
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

from facevae_jax.config import DataConfig, ModelConfig
from facevae_jax.data.batches import gather_rows
from facevae_jax.data.labels import open_attributes
from facevae_jax.data.pixels import open_splits
from facevae_jax.errors import UserError
from facevae_jax.files import atomic_writer
from facevae_jax.models.convolution import choose_form
from facevae_jax.models.vae import Encoder, Execution, to_unit

DLIB_SIDE = 150  # pixels, of what dlib's network takes
DLIB_WEIGHTS = "models/dlib_face_recognition_resnet_model_v1.dat"
SIDE = 64
FEATURES = 128
FILTERS = (32, 64, 128, 128)
EPOCHS, BATCH_SIZE, LEARNING_RATE = 6, 128, 2e-3
CACHE = pathlib.Path("~/.cache/facevae_jax").expanduser()


@functools.cache
def _dlib_network() -> Any:
    found = importlib.util.find_spec("face_recognition_models")  # not imported: it needs an old setuptools
    if not found or not found.origin or not importlib.util.find_spec("dlib"):
        raise UserError("benchmarks.face_features needs: pip install dlib-bin face_recognition_models")
    import dlib

    return dlib.face_recognition_model_v1(str(pathlib.Path(found.origin).parent / DLIB_WEIGHTS))


def dlib(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 128"]:
    """The descriptors of faces."""
    size = (DLIB_SIDE, DLIB_SIDE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return np.array(_dlib_network().compute_face_descriptor(large, 0))


class Classifier(nn.Module):
    """Faces to the logits of attributes, by way of `FEATURES` numbers."""

    classes: int

    def setup(self) -> None:  # noqa: D102
        config = ModelConfig(latent_dim=FEATURES, filters=FILTERS, normalization="group", kind="autoencoder")
        self.encoder = Encoder(config, Execution(choose_form("auto")))
        self.head = nn.Dense(self.classes)

    def features(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b f"]:
        """The last hidden layer."""
        return nn.silu(self.encoder(images, train=False).mean)

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b a"]:  # noqa: D102
        return self.head(self.features(images))


def attributes(images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n f"]:
    """The features of faces."""
    if images.shape[1:] != (SIDE, SIDE, 3):
        raise UserError(f"images of shape {list(images.shape[1:])}: this network takes {SIDE}x{SIDE}.")
    padded = np.pad(images, ((0, -len(images) % BATCH_SIZE), (0, 0), (0, 0), (0, 0)))
    read = _attribute_features()
    parts = [np.asarray(read(padded[at : at + BATCH_SIZE])) for at in range(0, len(padded), BATCH_SIZE)]
    return np.concatenate(parts)[: len(images)]


@functools.cache
def _attribute_features() -> Callable[[Any], Array]:
    """A compiled function of a batch."""
    data = DataConfig(name="celeba", resolution=SIDE)
    labels = open_attributes(data, "train").values
    network = Classifier(labels.shape[1])
    # Named by its images' labels: another training split is another network's.
    kept = CACHE / f"celeba_attribute_network_{SIDE}_{zlib.crc32(labels.tobytes()):08x}.npz"
    if not kept.exists():
        params = train(network, open_splits(data).train, labels)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(kept) as file:
            np.savez(file, **{"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()})
    with np.load(kept, allow_pickle=False) as file:
        params = unflatten_dict({tuple(name.split("/")): file[name] for name in file.files})

    @jax.jit
    def read(images: Array) -> Any:
        return network.apply({"params": params}, images, method="features")

    return read


def train(network: Classifier, pixels: UInt8[np.ndarray, "n h w 3"], labels: Float[np.ndarray, "n a"]) -> Any:
    """Parameters, by cross-entropy with mirrored images and Adam."""
    steps = EPOCHS * len(pixels) // BATCH_SIZE
    params: Any = network.init(jax.random.key(0), jnp.zeros((1, *pixels.shape[1:]), jnp.uint8))["params"]
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 100, steps))

    @jax.jit
    def step(params: Any, state: Any, images: Array, targets: Array, key: Array) -> tuple[Any, Any, Array]:
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        images = to_unit(jnp.where(mirrored, images[:, :, ::-1], images))

        def loss(params: Any) -> Array:
            logits: Any = network.apply({"params": params}, images)
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, draw = optimizer.init(params), np.random.default_rng(0)
    for number in range(steps):
        rows = np.sort(draw.choice(len(pixels), BATCH_SIZE, replace=False))
        key = jax.random.fold_in(jax.random.key(1), number)
        params, state, value = step(params, state, gather_rows(pixels, rows), labels[rows], key)
    print(f"a network for CelebA's attributes: cross-entropy {float(value):.3f} at the end of training")
    return params
