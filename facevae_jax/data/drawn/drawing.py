"""Anti-aliased drawing of many pictures at once with numpy.

Coordinates are resolution-free: x to the right and y downwards; the canvas shows a square of them. A layer is painted
only inside its bounding box (`Region`). Parameters of the n pictures are arrays [n, 1, 1] and planes are [n, h, w],
all float32.

Only +, -, *, /, sqrt, rint and comparisons touch a pixel: IEEE 754 rounds each of them in one way, so a picture has the
same bytes alone and in any batch. (Vectorised sin or exp may round differently at a batch's end or on another machine.)
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

Value = np.ndarray | float  # one for each picture [n, 1, 1] or for each pixel [n, h, w], or the same for all
Parameter = Float[np.ndarray, "#n 1 1"]
Plane = Float[np.ndarray, "#n #h #w"]  # also one row or one column that is broadcast
Color = Float[np.ndarray, "3 #n 1 1"]


class Region(NamedTuple):
    """A box of pixels, the same for every picture of the batch, with the coordinates of its pixels' centers.

    `u` and `v` are the box's x [1, 1, w] and y [1, h, 1], or both [n, h, w] in the frame of a `Pose`.
    """

    rows: slice
    columns: slice
    u: np.ndarray
    v: np.ndarray


class Pose(NamedTuple):
    """A frame turned by an angle about the image point (0, pivot), which is the frame's own point (0, level)."""

    cosine: Parameter
    sine: Parameter
    pivot: float
    level: float


class Canvas:
    """n square pictures in [0, 1], painted back to front."""

    def __init__(self, count: int, resolution: int, *, half_width: float = 1.0, middle: float = 0.0):
        """Shows x in [-half_width, half_width] and y in [middle - half_width, middle + half_width]."""
        self.pixel = 2 * half_width / resolution
        self._resolution = resolution
        self._x = np.arange(1 - resolution, resolution, 2, dtype=np.float32) * np.float32(half_width / resolution)
        self._y = self._x + np.float32(middle)
        self._left, self._top = -half_width, middle - half_width
        self._planes = np.zeros((3, count, resolution, resolution), np.float32)

    def region(self, left: Value, right: Value, top: Value, bottom: Value) -> Region:
        """The pixels between these coordinates: floats, or arrays of which the outermost is taken."""
        columns = self._span(left, right, start=self._left)
        rows = self._span(top, bottom, start=self._top)
        return Region(rows, columns, self._x[None, None, columns], self._y[None, rows, None])

    def posed_region(self, pose: Pose, u: Value, v: Value, half_width: Value, half_height: Value) -> Region:
        """The pixels around the box with center (u, v) in the frame `pose`, for every picture of the batch."""
        cosine, sine, pivot, level = pose
        x = cosine * u - sine * (v - level)
        y = sine * u + cosine * (v - level) + pivot
        reach_x = cosine * half_width + np.abs(sine) * half_height
        reach_y = np.abs(sine) * half_width + cosine * half_height
        rows, columns, x, y = self.region(x - reach_x, x + reach_x, y - reach_y, y + reach_y)
        y = y - pivot
        return Region(rows, columns, cosine * x + sine * y, cosine * y + level - sine * x)

    def coverage(self, distance: Plane) -> Plane:
        """The share of each pixel that lies inside the edge. `distance` is signed, negative inside."""
        return np.minimum(np.maximum(distance * (-1 / self.pixel) + 0.5, 0), 1)

    def between(self, v: Plane, upper: Value, lower: Value) -> Plane:
        """The share of each pixel with upper < v < lower; right for strips thinner than a pixel too."""
        return np.maximum(self.coverage(upper - v) + self.coverage(v - lower) - 1, 0)

    def paint(
        self, region: Region, opacity: Plane, color: Color, *, towards: Color | None = None, amount: Plane | None = None
    ) -> None:
        """Lays `color` over the region, or color + amount * (towards - color) where these two are given."""
        for channel in range(3):
            under = self._planes[channel, :, region.rows, region.columns]
            over = color[channel]
            if towards is not None and amount is not None:
                over = amount * (towards[channel] - over) + over
            under += (over - under) * opacity

    def to_bytes(self, out: UInt8[np.ndarray, "n r r 3"]) -> None:
        """Rounds the pictures into `out`."""
        for plane, channel in zip(self._planes, np.moveaxis(out, -1, 0), strict=True):
            np.copyto(channel, np.minimum(np.maximum(plane * 255 + 0.5, 0), 255), casting="unsafe")

    def _span(self, low: Value, high: Value, *, start: float) -> slice:
        # One pixel more on each side: an edge that touches the box still fades out over half a pixel.
        first = int(np.floor((np.min(low) - start) / self.pixel)) - 1
        last = int(np.ceil((np.max(high) - start) / self.pixel)) + 1
        first = min(max(first, 0), self._resolution)
        return slice(first, min(max(last, first), self._resolution))


def ellipse(u: Plane, v: Plane, half_width: Value, half_height: Value) -> Plane:
    """The signed distance to an ellipse around (0, 0), exact to first order at its edge."""
    across, along = u / half_width, v / half_height
    slope = np.sqrt(np.square(across / half_width) + np.square(along / half_height) + 1e-6)  # it vanishes at the center
    return (across * across + along * along - 1) / (slope * 2)


def blob(u: Plane, v: Plane, half_width: Value, half_height: Value) -> Plane:
    """A soft spot: 1 at (0, 0), falling smoothly to 0 at the ellipse."""
    return np.square(np.maximum(1 - (np.square(u / half_width) + np.square(v / half_height)), 0))


def arch(u: Plane, half_width: Value) -> Plane:
    """1 at u = 0, falling as a parabola through 0 at |u| = half_width."""
    return 1 - np.square(u / half_width)


def wave(phase: np.ndarray) -> np.ndarray:
    """Close to sin(2 pi phase), made of parabolas."""
    phase = phase - np.rint(phase)
    return phase * (8 - 16 * np.abs(phase))


def rounded_box(u: Plane, v: Plane, half_width: Value, half_height: Value, corner: float) -> Plane:
    """The signed distance to a box around (0, 0) with rounded corners."""
    across = np.abs(u) - (half_width - corner)
    along = np.abs(v) - (half_height - corner)
    outside = np.sqrt(np.square(np.maximum(across, 0)) + np.square(np.maximum(along, 0)))
    return outside + np.minimum(np.maximum(across, along), 0) - corner


def rise(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """A smooth step from 0 at `low` to 1 at `high`."""
    step = (value - low) * (1 / (high - low))
    step = np.minimum(np.maximum(step, 0), 1)
    return step * step * (3 - 2 * step)


def palette(position: Parameter, *stops: str) -> Color:
    """The color at `position` in [0, 1] along evenly spaced stops written as rrggbb."""
    place = position * (len(stops) - 1)
    mixed = np.zeros((3, *place.shape), np.float32)
    for index, stop in enumerate(stops):
        weight = np.maximum(1 - np.abs(place - index), 0)
        mixed += weight * flat(stop)
    return mixed


def flat(stop: str) -> Color:
    """The color written as rrggbb, the same for every picture."""
    return np.array([int(stop[at : at + 2], 16) / 255 for at in (0, 2, 4)], np.float32).reshape(3, 1, 1, 1)


def mix(color: Color, other: Color, share: Value) -> Color:
    """Goes `share` of the way from `color` to `other`."""
    return color + (other - color) * share


def cosine_sine(degrees: Parameter) -> tuple[Parameter, Parameter]:
    """Cosine and sine of angles up to 30 degrees, right to 1e-4, by plain arithmetic."""
    angle = degrees * (np.pi / 180)
    square = angle * angle
    return 1 - square / 2 + square * square / 24, angle * (1 - square / 6 + square * square / 120)
