import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facevae_jax.latents import paths


def latents(count: int, size: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize("method", ["lerp", "slerp"])
@given(seed=st.integers(0, 1000), steps=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_path_has_its_stops_exactly(method, seed, steps, scale):
    stops = latents(3, seed=seed) * np.float32(scale)
    way = paths.path(stops, steps, method=method)
    assert way.shape == (2 * steps + 1, 7)
    assert way.dtype == np.float32
    np.testing.assert_array_equal(way[::steps], stops)
    loop = paths.path(stops, steps, method=method, loop=True)
    np.testing.assert_array_equal(loop[::steps], stops)
    assert len(loop) == 3 * steps
    if steps > 1:  # the last is on the way back to the first, which comes next when the animation repeats
        back = paths.path(stops[[2, 0]], steps, method=method)
        np.testing.assert_array_equal(loop[2 * steps :], back[:-1])


def test_lerp_goes_straight_at_one_speed():
    a, b = latents(2)
    steps = np.diff(paths.path(np.stack([a, b]), 5), axis=0)
    np.testing.assert_allclose(steps, np.tile((b - a) / 5, (5, 1)), rtol=1e-4, atol=1e-6)


def test_slerp_keeps_the_length_and_turns_at_one_speed():
    a, b = latents(2, size=50)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    way = paths.path(np.stack([a, b]) * 7, 6, method="slerp").astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 7, rtol=1e-6)
    cosines = np.sum(way[1:] * way[:-1], axis=1) / 49
    np.testing.assert_allclose(np.arccos(cosines), np.arccos(float(a @ b)) / 6, rtol=1e-4)


@pytest.mark.parametrize(("a", "b"), [([1, 2], [2, 4]), ([1, 2], [-1, -2]), ([0, 0], [1, 1]), ([0, 0], [0, 0])])
def test_slerp_without_an_arc_is_a_line(a, b):
    stops = np.array([a, b], np.float32)
    way = paths.path(stops, 4, method="slerp")
    assert np.isfinite(way).all()
    np.testing.assert_array_equal(way, paths.path(stops, 4))


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_a_square_has_its_corners_exactly(method):
    corners = latents(4)
    square = paths.square(corners, rows=3, columns=5, method=method)
    assert square.shape == (3, 5, 7)
    np.testing.assert_array_equal(square[[0, 0, 2, 2], [0, 4, 0, 4]], corners)
    np.testing.assert_array_equal(square[1], paths.path(square[1, [0, 4]], 4, method=method))
    if method == "lerp":
        np.testing.assert_allclose(square[1, 2], corners.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_impossible_paths_are_refused():
    with pytest.raises(ValueError, match="stops"):
        paths.path(np.empty((0, 3), np.float32), 4)
    with pytest.raises(ValueError, match="4 corners"):
        paths.square(latents(3), rows=2, columns=2)
