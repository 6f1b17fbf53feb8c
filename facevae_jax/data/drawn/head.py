"""The head of a drawn face: its pose, its colors and its hair, as functions of the attributes."""

import numpy as np

from facevae_jax.data.drawn.drawing import (
    Canvas,
    Parameter,
    Plane,
    Pose,
    Region,
    blob,
    cosine_sine,
    ellipse,
    flat,
    palette,
    rise,
    wave,
)


class Head:
    """A batch of heads on a canvas. Their frame has its origin between the eyes; lengths are in canvas units."""

    def __init__(self, canvas: Canvas, values: dict[str, Parameter]):
        self.canvas = canvas
        self.values = values
        self.light = values["light"]
        tilt_cosine, tilt_sine = cosine_sine(values["tilt"])
        self.pose = Pose(tilt_cosine, tilt_sine, pivot=0.46, level=0.48)
        self.turn_cosine, self.turn = cosine_sine(values["turn"])
        self.width = 0.445 + 0.08 * values["face_width"]
        self.skin = palette(values["skin_tone"], "ffe3d0", "f6c9a6", "e3aa7e", "c08356", "8f5a3a", "613a28")
        self.shadow = self.skin * flat("bd8784")
        self.hair = palette(values["hair_colour"], "25201f", "4a2f24", "8a4326", "c98a45", "ead09a", "cfccca")
        self.volume = rise(values["hair_length"], 0, 0.5)
        self.hair_end = -0.05 + 1.5 * values["hair_length"]

    def around(self, depth: float, u: float = 0.0) -> tuple[Parameter, Parameter]:
        """Where the turned head shows the point at `u` on a sphere of radius `depth`, and how much it is narrowed."""
        forward = float(np.sqrt(depth**2 - u**2))
        return u * self.turn_cosine + forward * self.turn, self.turn_cosine - (u / forward) * self.turn

    def _hair_region(self) -> Region:
        top, end = -0.85, np.maximum(self.hair_end, 0) + 0.05
        return self.canvas.posed_region(self.pose, 0.02 * self.turn, (end + top) / 2, 0.72, (end - top) / 2)

    def _hull(self, region: Region) -> tuple[Plane, Plane, Plane]:
        """The outline of all the hair: an ellipse whose lower half is drawn out by the hair's length.

        Returns the signed distance, and coordinates that are those of a unit circle on the upper half's outline.
        """
        curl = self.values["hair_curl"]
        v = region.v + 0.14
        low = np.maximum(v, 0)
        u = region.u - 0.02 * self.turn
        wide = self.width + 0.035 + 0.075 * self.volume + (0.05 * curl) * self.volume
        wide = wide * (1 + 0.10 * low) + (0.022 * curl) * np.minimum(low * 4, 1) * wave(2.6 * region.v)
        u = u / wide
        tall = 0.545 + 0.075 * self.volume + 0.03 * curl
        reach = np.maximum(self.hair_end + 0.14, 0.12)
        square = np.square(low / reach)
        v = np.minimum(v, 0) / tall
        radius = u * u + v * v + square * square
        slope = np.sqrt(np.square(u / wide) + np.square(v / tall) + np.square(2 * square * low / (reach * reach)))
        return (radius - 1) / (2 * slope + 1e-3), u, v

    def paint_back_hair(self) -> None:
        """Paints the hair behind the face."""
        region = self._hair_region()
        edge, u, v = self._hull(region)
        # Inside the outline of the hair in front: two half-covered edges on one line add up to a bolder one.
        edge = edge + 0.02 * (1 - rise(region.v - self.hair_end, -0.45, -0.1))
        inner = np.minimum(np.maximum(1 - u * u - v * v, 0) * 2, 1)
        dark = self.hair * flat("9c8474")
        self.canvas.paint(region, self.canvas.coverage(edge), self.hair, towards=dark, amount=inner)

    def paint_front_hair(self) -> None:
        """Paints the hair that frames the face."""
        region = self._hair_region()
        edge, hull_u, hull_v = self._hull(region)
        coverage = self.canvas.coverage(edge)
        fringe, length = self.values["fringe"], self.values["hair_length"]
        long = rise(length, 0.1, 0.55)
        # The opening that shows the face: a pointed arch below the parting, straight sides, closed strands at the ends.
        v = region.v - 0.10
        parting = 0.20 * self.values["parting"]
        u = region.u - 0.14 * self.turn
        tips = rise((region.v - self.hair_end) / (0.3 + 0.3 * long), -1, 0)
        half = self.width - 0.02 - 0.08 * long * (1 - rise(region.v, 0.1, 0.6)) + 0.20 * tips
        apart = u - parting
        side = np.where(apart < 0, half + parting, half - parting)
        point = 0.40 * (1 - fringe)
        opening = ellipse(np.abs(apart) + point * side, np.minimum(v, 0), side * (1 + point), 0.62 - 0.30 * fringe)
        cast = rise(opening, -0.11, 0.01) * coverage * (0.5 - 0.5 * rise(region.v, -0.3, 0.0))
        self.canvas.paint(region, cast, self.shadow * 0.9)
        coverage = coverage * (1 - self.canvas.coverage(opening)) * self.canvas.coverage(region.v - (0.04 + 1.6 * long))
        round_ = np.sqrt(np.maximum(1 - hull_v * hull_v, 0.08))
        strand = (hull_u - 0.4 * self.values["parting"]) / round_
        strand = wave(strand * (2.7 + 0.45 * self.values["hair_curl"] * wave(2.6 * region.v)) + 0.25)
        sheen = blob(hull_u - 0.4 * self.light, hull_v + 0.62, 1.0, 0.34)
        shade = sheen * (0.9 + 0.35 * strand) + 0.10 * strand + 0.35 * self.light * hull_u - 0.15 * hull_u * hull_u
        # `shade` also falls below 0, where it darkens: the second term gives light hair, too near to white for the
        # first, something to lose there.
        bright = self.hair + 0.30 * (flat("fff0dc") - self.hair) + 0.22 * self.hair * flat("60809a")
        self.canvas.paint(region, coverage, self.hair, towards=bright, amount=shade)
