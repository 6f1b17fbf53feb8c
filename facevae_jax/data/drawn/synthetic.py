"""Human faces drawn from known attributes: for tests, demonstrations and measuring what a latent space learns.

    images = faces(np.arange(8192), resolution=64)     # uint8 [8192, 64, 64, 3]
    labels = attributes(np.arange(8192))               # {"smile": float32 [8192], ...}

A picture is a pure function of its attributes, and an attribute is a pure function of (index, name). Attributes
are independent of each other, and pictures vary smoothly in them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8

from facevae_jax.data.drawn.drawing import Canvas
from facevae_jax.data.drawn.portrait import Portrait
from facevae_jax.data.plan import splitmix64

VERSION = "1.0.0"  # of the drawing: a change of any pixel is another dataset, kept in another directory
HALF_WIDTH, MIDDLE = 0.84, 0.03  # of the square that is shown: from hair to collar, as FFHQ is cropped
PIXELS_AT_ONCE = 24 * 64**2  # measured: fewer pay for numpy calls, more do not fit the processor's cache


class Attribute(NamedTuple):
    """One labeled property of a face.

    Continuous attributes are uniform in [low, high]. Binary ones are 0 or 1, and 1 with probability `frequency`;
    a value between is drawn half transparent.
    """

    name: str
    meaning: str
    low: float = 0.0
    high: float = 1.0
    kind: Literal["continuous", "binary"] = "continuous"
    frequency: float | None = None


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("skin_tone", "0 light to 1 dark"),
    Attribute("hair_colour", "black, brown, auburn, golden, blond, silver at equal steps from 0 to 1"),
    Attribute("hair_length", "0 short crop, 0.5 to the chin, 1 below the shoulders"),
    Attribute("hair_curl", "0 straight to 1 wavy"),
    Attribute("fringe", "0 bare forehead to 1 hair down to the brows"),
    Attribute("parting", "where the hair is parted: -1 left, 0 middle, 1 right of the picture", -1),
    Attribute("eye_colour", "brown, amber, green, teal, blue at equal steps from 0 to 1"),
    Attribute("eye_open", "0 narrow to 1 wide open"),
    Attribute("brow_height", "0 lowered to 1 raised"),
    Attribute("brow_thickness", "0 thin to 1 bushy"),
    Attribute("nose_width", "0 narrow to 1 wide"),
    Attribute("face_width", "0 narrow to 1 wide"),
    Attribute("jaw", "0 pointed to 1 square"),
    Attribute("smile", "-1 frown, 0 neutral, 1 broad smile", -1),
    Attribute("mouth_open", "0 closed to 1 open, teeth showing"),
    Attribute("lip_fullness", "0 thin to 1 full"),
    Attribute("beard", "0 none, 1 full beard and moustache", kind="binary", frequency=0.2),
    Attribute("glasses", "0 none, 1 spectacles", kind="binary", frequency=0.3),
    Attribute("turn", "degrees; the face looks to the picture's right where positive", -20, 20),
    Attribute("tilt", "degrees; the head leans to the picture's right where positive", -6, 6),
    Attribute("light", "where the light comes from: -1 left, 0 front, 1 right of the picture", -1),
    Attribute("background", "rose, sand, green, aqua, blue, violet, pink at equal steps from 0 to 1"),
    Attribute("shirt", "navy, teal, green, mustard, brick, plum at equal steps from 0 to 1"),
)


def attributes(indices: Int[np.ndarray, " n"]) -> dict[str, Float32[np.ndarray, " n"]]:
    """The attributes of the faces `indices` (0 to 2**63 - 1), by name, in the units and ranges of `ATTRIBUTES`.

    A face does not depend on the other indices.
    """
    index = np.asarray(indices).astype(np.uint64)
    values = {}
    for attribute in ATTRIBUTES:
        key = splitmix64(splitmix64(np.zeros(1, np.uint64)) ^ _name_hash(attribute.name))
        bits = splitmix64(splitmix64(index) ^ key) >> np.uint64(40)
        uniform = bits.astype(np.float32) * np.float32(2**-24)  # 24 bits: exact in float32, and below 1
        if attribute.frequency is None:
            uniform = np.float32(attribute.low) + np.float32(attribute.high - attribute.low) * uniform
        else:
            uniform = (uniform < attribute.frequency).astype(np.float32)
        values[attribute.name] = uniform
    return values


def faces(indices: Int[np.ndarray, " n"], *, resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    """Draws the faces `indices`: `draw(attributes(indices), resolution=resolution)`."""
    return draw(attributes(indices), resolution=resolution)


def draw(attributes: Mapping[str, np.ndarray], *, resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    """Draws one face for each entry of the attributes' arrays, in sRGB.

    Each is float [n]; values outside an attribute's range are clipped to it. The picture is the same at every
    resolution, 32 to 1024 pixels, but for its sharpness.

    Raises ValueError: names other than those of `ATTRIBUTES`.
    """
    names = {attribute.name for attribute in ATTRIBUTES}
    if names != set(attributes):
        raise ValueError(f"attributes: {sorted(names ^ set(attributes))} missing or unknown; have {sorted(names)}")
    values = {
        attribute.name: np.clip(np.asarray(attributes[attribute.name], np.float32), attribute.low, attribute.high)
        for attribute in ATTRIBUTES
    }
    count = len(values["turn"])
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    chunk = max(1, PIXELS_AT_ONCE // resolution**2)
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        canvas = Canvas(len(images[rows]), resolution, half_width=HALF_WIDTH, middle=MIDDLE)
        Portrait(canvas, {name: value[rows, None, None] for name, value in values.items()}).draw()
        canvas.to_bytes(images[rows])
    return images


def _name_hash(name: str) -> np.uint64:
    """FNV-1a: unlike `hash`, the same in every process."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return np.uint64(value)
