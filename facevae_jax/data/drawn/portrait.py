"""The parts of a drawn face, from the background to the spectacles, as functions of the attributes."""

import numpy as np

from facevae_jax.data.drawn.drawing import Plane, Region, arch, blob, ellipse, flat, mix, palette, rise, rounded_box
from facevae_jax.data.drawn.head import Head

WHITE = flat("ffffff")


class Portrait(Head):
    """A batch of faces on a canvas."""

    def draw(self) -> None:
        """Paints every layer, back to front."""
        self._background()
        self.paint_back_hair()
        self._shirt()
        self._neck()
        self._ears()
        self._head()
        self._beard()
        self._nose()
        self._mouth()
        for side in (-1, 1):
            self._eye(side)
            self._brow(side)
        self._glasses()
        self.paint_front_hair()

    def _background(self) -> None:
        region = self.canvas.region(-1, 1, -1, 1)
        color = palette(self.values["background"], "eebfb0", "f3d9a8", "c3dcae", "a5d8d0", "a3c5ea", "bfb4e4", "e2b0cf")
        glow = blob(region.u - 0.3 * self.light, region.v + 0.25, 1.7, 1.7)
        self.canvas.paint(region, np.ones_like(glow), color * 0.82, towards=mix(color, WHITE, 0.35), amount=glow)

    def _shirt(self) -> None:
        region = self.canvas.region(-1, 1, 0.6, 1)
        color = palette(self.values["shirt"], "2d4263", "2f7d80", "6f9a55", "e3b448", "cc5f45", "84446f")
        v = region.v
        coverage = self.canvas.coverage(ellipse(region.u, v - 1.30, 0.92, 0.56))
        shade = 0.3 - 0.5 * self.light * region.u + 0.3 * (v - 0.8)
        self.canvas.paint(region, coverage, color, towards=color * 0.6, amount=shade)
        collar = self.canvas.coverage(ellipse(region.u, v - 0.715, 0.27, 0.172)) * coverage
        self.canvas.paint(region, collar, color * 0.72)

    def _neck(self) -> None:
        region = self.canvas.region(-0.42, 0.42, 0.3, 0.9)
        lean = self.pose.sine * 0.12
        u = region.u - lean * np.maximum(0.8 - region.v, 0)
        low = np.maximum(region.v - 0.52, 0)
        neck = self.canvas.coverage(np.maximum(np.abs(u) - (0.19 + 1.05 * low * low), region.v - 0.72))
        neck = np.maximum(
            neck, self.canvas.coverage(ellipse(region.u, np.maximum(region.v - 0.70, -0.01), 0.232, 0.145))
        )
        shade = 0.3 - 0.6 * self.light * region.u / 0.25
        shade = shade + 1.0 * blob(region.u - 0.12 * self.turn, region.v - 0.48, 0.5, 0.24)
        self.canvas.paint(region, neck, self.skin, towards=self.shadow, amount=shade)

    def _ears(self) -> None:
        for side in (-1, 1):
            u = side * (self.width - 0.005) - 0.05 * self.turn
            region = self.canvas.posed_region(self.pose, u, 0.08, 0.085, 0.14)
            ear_u, ear_v = region.u - u, region.v - 0.08
            shade = blob(ear_u, ear_v, 0.065, 0.10) + (0.25 - 0.45 * side * self.light)
            coverage = self.canvas.coverage(ellipse(ear_u + (0.1 * side) * ear_v, ear_v, 0.08, 0.13))
            self.canvas.paint(region, coverage, self.skin, towards=self.shadow, amount=shade)

    def _face(self, region: Region) -> tuple[Plane, Plane]:
        """Coordinates that are those of a unit circle on the outline of the face."""
        low = np.maximum(region.v, 0) ** 2
        jaw = 0.62 - 0.40 * self.values["jaw"]
        u = region.u - 0.06 * self.turn - (0.28 * self.turn) * low
        return u / (self.width * (1 - jaw * low)), (region.v + 0.02) / 0.64

    def _head(self) -> None:
        region = self.canvas.posed_region(self.pose, 0.08 * self.turn, -0.02, self.width + 0.09, 0.65)
        u, v = self._face(region)
        coverage = self.canvas.coverage(ellipse(u, v, 1, 1) * 0.52)
        shade = u * (-0.55 * self.light) + 0.25 * u * u + 0.14 * v
        self.canvas.paint(region, coverage, self.skin, towards=self.shadow, amount=shade)
        for side in (-1, 1):
            at, narrow = self.around(0.48, 0.23 * side)
            cheek = self.canvas.posed_region(self.pose, at, 0.22, 0.17, 0.15)
            spot = blob(cheek.u - at, cheek.v - 0.22, 0.17 * narrow, 0.15) * 0.24
            self.canvas.paint(cheek, spot, self.skin * flat("ff8a80"))

    def _beard(self) -> None:
        opacity = self.values["beard"]
        if not opacity.any():
            return
        region = self.canvas.posed_region(self.pose, 0.15 * self.turn, 0.38, self.width + 0.09, 0.34)
        u, v = self._face(region)
        at, _ = self.around(0.46)
        coverage = self.canvas.coverage((ellipse(u, v, 1.01, 1.05)) * 0.52)
        cheek_u = np.maximum(np.abs(region.u - at) - 0.02, 0)
        cheek = ellipse(cheek_u - 0.17, region.v - 0.07, self.width - 0.24, 0.25)
        coverage *= 1 - self.canvas.coverage(cheek)
        lip = ellipse(region.u - at, region.v - 0.12, 0.16, 0.15)
        coverage = coverage * (1 - self.canvas.coverage(lip)) * rise(region.v, 0.05, 0.2) * (opacity * 0.94)
        shade = 0.3 - u * (0.4 * self.light)
        dark = self.hair * 0.9
        self.canvas.paint(region, coverage, dark, towards=dark * 0.6, amount=shade)

    def _nose(self) -> None:
        tip, _ = self.around(0.57)
        bridge, _ = self.around(0.48)
        width = 0.050 + 0.075 * self.values["nose_width"]
        region = self.canvas.posed_region(self.pose, (tip + bridge) / 2, 0.12, 3 * width + 0.05, 0.2)
        v = region.v
        u = region.u - bridge - (tip - bridge) * rise(v, -0.05, 0.22)
        dark = blob(u + (0.9 * self.light + 1.6 * self.turn) * width, v - 0.11, width * 1.3, 0.19)
        self.canvas.paint(region, dark * (0.30 * np.abs(self.light) + 0.18), self.shadow)
        bright = blob(u - 0.3 * self.light * width, v - 0.12, width * 0.7, 0.15) * 0.35
        self.canvas.paint(region, bright, mix(self.skin, WHITE, 0.4))
        hump = arch(u, width)
        curve = 0.222 + 0.036 * hump
        under = self.canvas.between(v, curve - 0.020 * np.maximum(hump, 0), curve) * 0.75
        self.canvas.paint(region, under, self.shadow * 0.8)
        nostril = blob(np.abs(u) - 0.48 * width, v - 0.238, 0.42 * width, 0.022) * 0.9
        self.canvas.paint(region, nostril, self.shadow * 0.55)

    def _mouth(self) -> None:
        smile = self.values["smile"]
        smile = smile * (1 + 0.25 * smile)
        at, narrow = self.around(0.50)
        half = (0.165 + 0.03 * smile) * narrow
        region = self.canvas.posed_region(self.pose, at, 0.40, 0.21, 0.17)
        u = region.u - at
        v = region.v - 0.39
        hump = arch(u, half)
        line = (hump - 0.5) * (0.080 * smile)
        hump = np.maximum(hump, 0)
        gap = self.values["mouth_open"] * hump
        upper = line - 0.018 * gap
        lower = line + 0.070 * gap
        full = 0.4 + 1.2 * self.values["lip_fullness"]
        rose = mix(self.skin * flat("d98a88"), flat("c0484f"), 0.4)
        cupid = (0.038 * full) * hump * (1 - 0.25 * blob(u, 0 * u, 0.05, 1))
        self.canvas.paint(region, self.canvas.between(v, upper - cupid, upper + 0.007 * hump), rose * 0.86)
        self.canvas.paint(region, self.canvas.between(v, upper, lower), flat("5b1f26"))
        teeth = np.minimum(upper + 0.034 * hump, lower)
        self.canvas.paint(region, self.canvas.between(v, upper, teeth), flat("fbf6ef"))
        bottom = lower + (0.050 * full) * hump
        gloss = blob(u - 0.04 * self.light, v - lower - 0.02 * full, 0.08, 0.024) * 0.35
        self.canvas.paint(region, self.canvas.between(v, lower, bottom), rose, towards=WHITE, amount=gloss)

    def _eye(self, side: int) -> None:
        at, narrow = self.around(0.48, 0.20 * side)
        half = 0.112 * narrow
        region = self.canvas.posed_region(self.pose, at, -0.02, 0.16, 0.14)
        u, v = region.u - at, region.v
        self.canvas.paint(region, blob(u, v + 0.04, 0.16, 0.11) * 0.4, self.shadow)  # socket
        hump = np.maximum(arch(u, half), 0)
        height = 0.6 + 0.6 * self.values["eye_open"]
        upper = hump * (-0.068 * height)
        lower = hump * (0.045 * height)
        white = self.canvas.between(v, upper, lower)
        dim = rise(upper - v, -0.035, 0.0)
        self.canvas.paint(region, white, flat("fbfaf8"), towards=flat("b9aeb0"), amount=dim)
        look, level = u - 0.05 * self.turn, v + 0.008
        color = palette(self.values["eye_colour"], "4a2c1a", "9a6228", "6f8a3c", "3f8f92", "4a86cf")
        iris = self.canvas.coverage(ellipse(look, level, 0.054, 0.054)) * white
        glow = blob(look, level - 0.02, 0.052, 0.052)
        self.canvas.paint(region, iris, color * 0.7, towards=mix(color, WHITE, 0.25), amount=glow)
        pupil = self.canvas.coverage(ellipse(look, level, 0.024, 0.024)) * white
        self.canvas.paint(region, pupil, flat("120c0c"))
        spark = self.canvas.coverage(ellipse(look - 0.018 * self.light, level + 0.019, 0.0145, 0.0145)) * white
        self.canvas.paint(region, spark, WHITE)
        lash = self.canvas.between(v, upper - 0.026 * hump - 0.003, upper + 0.007 * hump) * np.minimum(hump * 8, 1)
        self.canvas.paint(region, lash, flat("2a1a18"))

    def _brow(self, side: int) -> None:
        at, narrow = self.around(0.49, 0.205 * side)
        half = 0.135 * narrow
        height = -0.155 - 0.06 * self.values["brow_height"]
        region = self.canvas.posed_region(self.pose, at, height, 0.15, 0.08)
        u, v = region.u - at, region.v - height
        line = -0.040 * arch(u - 0.004 * side, half) + 0.020
        hump = np.maximum(arch(u, half), 0)
        thick = (0.010 + 0.022 * self.values["brow_thickness"]) * hump * (1 - (2.0 * side) * u)
        brow = self.canvas.between(v, line - thick, line + thick) * 0.9
        self.canvas.paint(region, brow, mix(self.hair * 0.65, flat("2a1c18"), 0.35))

    def _glasses(self) -> None:
        opacity = self.values["glasses"]
        if not opacity.any():
            return
        frame = flat("2a2730")
        for side in (-1, 1):
            at, narrow = self.around(0.53, 0.205 * side)
            half = 0.155 * narrow
            region = self.canvas.posed_region(self.pose, at, 0.0, 0.19, 0.15)
            u, v = region.u - at, region.v - 0.005
            edge = rounded_box(u, v, half, 0.125, 0.08)
            lens = self.canvas.coverage(edge + 0.012)
            rim = (self.canvas.coverage(edge - 0.012) - lens) * opacity
            glare = lens * (rise(side * u - v, -0.02, 0.10) * 0.12 + 0.08) * opacity
            self.canvas.paint(region, glare, WHITE)
            self.canvas.paint(region, rim, frame)
            outer = side * self.width + 0.06 * self.turn
            joint = at + side * half
            arm = self.canvas.posed_region(self.pose, (outer + joint) / 2, -0.03, np.abs(outer - joint) / 2, 0.03)
            bar = self.canvas.coverage(side * (joint - arm.u)) * self.canvas.coverage(side * (arm.u - outer))
            self.canvas.paint(arm, bar * self.canvas.between(arm.v, -0.048, -0.022) * opacity, frame)
        left, left_narrow = self.around(0.53, -0.205)
        right, right_narrow = self.around(0.53, 0.205)
        left, right = left + 0.155 * left_narrow, right - 0.155 * right_narrow
        region = self.canvas.posed_region(self.pose, (left + right) / 2, -0.02, 0.1, 0.06)
        hump = arch(region.u - (left + right) / 2, (right - left) / 2 + 0.02)
        bridge = self.canvas.between(region.v, -0.03 * hump, -0.03 * hump + 0.022)
        within = self.canvas.coverage(left - region.u), self.canvas.coverage(region.u - right)
        self.canvas.paint(region, bridge * within[0] * within[1] * opacity, frame)
