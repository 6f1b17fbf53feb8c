"""Features of a network that was trained to tell faces apart: `--features=benchmarks.face_features:dlib`.

    pip install dlib-bin face_recognition_models

dlib's 29-layer residual network (King 2017), 128 numbers a face; the weights are in the package, which is CC0. It takes
squares of 150 pixels that hold an upright face, as CelebA's and FFHQ's crops do, enlarged by a bicubic filter.
"""

import functools
import importlib.util
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from facevae_jax.errors import UserError

SIDE = 150  # pixels, of what the network takes
WEIGHTS = "models/dlib_face_recognition_resnet_model_v1.dat"


@functools.cache
def _network() -> Any:
    found = importlib.util.find_spec("face_recognition_models")  # not imported: it needs an old setuptools
    if not found or not found.origin or not importlib.util.find_spec("dlib"):
        raise UserError("benchmarks.face_features needs: pip install dlib-bin face_recognition_models")
    import dlib

    return dlib.face_recognition_model_v1(str(pathlib.Path(found.origin).parent / WEIGHTS))


def dlib(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 128"]:
    """The descriptors of faces."""
    large = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return np.array(_network().compute_face_descriptor(large, 0))
