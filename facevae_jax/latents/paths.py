"""Paths between latents: lines, arcs, loops and the square between four corners."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32

Path = Literal["lerp", "slerp"]

# Below this sine of the angle between two latents, the arc is a line up to float32 rounding.
SMALLEST_SINE = 1e-4


def lerp(
    a: Float[np.ndarray, " z"], b: Float[np.ndarray, " z"], weights: Sequence[float]
) -> Float32[np.ndarray, "n z"]:
    """Points on the line from `a` to `b`; weights 0 and 1 give them exactly.

    Args:
      a: the start.
      b: the end.
      weights: of `b`.
    """
    w = np.asarray(weights, np.float64)[:, None]
    # a + w (b - a) would not give `b` exactly.
    return ((1 - w) * a + w * b).astype(np.float32)


def slerp(
    a: Float[np.ndarray, " z"], b: Float[np.ndarray, " z"], weights: Sequence[float]
) -> Float32[np.ndarray, "n z"]:
    """Points on the arc around the origin from `a` to `b`, at equal angles for equal weights (Shoemake 1985).

    Latents of N(0, I) have a length near sqrt(z). An arc keeps it, while the middle of a line is shorter by a factor of
    sqrt(2) (White 2016, "Sampling generative networks", section 2). If `a` and `b` are parallel or one is zero, the
    line is used.

    Args:
      a: the start, which weight 0 gives exactly.
      b: the end, which weight 1 gives exactly.
      weights: fractions of the path.
    """
    lengths = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
    cosine = float(a.astype(np.float64) @ b.astype(np.float64)) / lengths if lengths else 1.0
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.sin(angle) < SMALLEST_SINE:
        return lerp(a, b, weights)
    w = np.asarray(weights, np.float64)[:, None]
    # sin(angle) of both ends divides to exactly 1, and 0 x the other end is exactly 0.
    return ((np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)).astype(np.float32)


PATHS = {"lerp": lerp, "slerp": slerp}


def path(
    stops: Float[np.ndarray, "k z"], steps: int, *, method: Path = "lerp", loop: bool = False
) -> Float32[np.ndarray, "n z"]:
    """A path through all stops, `steps` latents from each to the next; it contains the stops exactly.

    Args:
      stops: at least one; one alone is repeated.
      steps: latents from one stop to the next, counting one of the two: k stops make (k - 1) steps + 1 latents.
      method: the line or the arc.
      loop: the path returns to the first stop, without repeating it: k steps latents, for an animation that repeats.

    Raises:
      ValueError: no stops, or no steps.
    """
    if len(stops) < 1 or steps < 1:
        raise ValueError(f"a path needs stops and steps, not {len(stops)} and {steps}")
    weights = np.arange(steps) / steps
    ends = [*range(1, len(stops)), *([0] if loop else [])]
    legs = [PATHS[method](stops[end - 1], stops[end], list(weights)) for end in ends]
    last = [] if loop else [stops[-1:].astype(np.float32)]
    return np.concatenate([*legs, *last])


def square(
    corners: Float[np.ndarray, "k z"], *, rows: int, columns: int, method: Path = "lerp"
) -> Float32[np.ndarray, "rows columns z"]:
    """Latents between four corners, in reading order: top left, top right, bottom left, bottom right.

    The left and right sides are paths between their corners, and each row is a path from the left to the right side.

    Raises:
      ValueError: not four corners, or fewer than two rows or columns.
    """
    if len(corners) != 4 or min(rows, columns) < 2:
        raise ValueError(f"a square needs 4 corners and at least 2x2 places, not {len(corners)} and {rows}x{columns}")
    left, right = (path(corners[[top, bottom]], rows - 1, method=method) for top, bottom in ((0, 2), (1, 3)))
    return np.stack([path(np.stack(ends), columns - 1, method=method) for ends in zip(left, right, strict=True)])
