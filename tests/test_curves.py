"""Edits that bend: on latents whose curve is known, and from a run's folder."""

import numpy as np
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.latents.directions import Labels, Whitening, fit_direction
from facevae_jax.latents.moments import moments_of
from facevae_jax.trained import edit_curves
from facevae_jax.trained.edit_curves import Curve, fit_attribute_map
from tests.scattered import random_model

IMAGES = 6_000


@pytest.fixture(scope="module")
def arc():
    """One attribute leads round most of a circle, as long hair or a turned head would; another along a line."""
    generator = np.random.default_rng(0)
    angle, height = generator.uniform(-2, 2, IMAGES), generator.normal(size=IMAGES)
    latents = np.stack([2 * np.cos(angle), 2 * np.sin(angle), height, generator.normal(size=IMAGES)], axis=1)
    latents = (latents + 0.05 * generator.normal(size=latents.shape)).astype(np.float32)
    whitening = Whitening.of(moments_of(latents, np.full_like(latents, -6.0)))
    return latents, whitening, Labels("angle", False, angle), Labels("height", False, height)


def angle_of(latents):
    return np.arctan2(latents[:, 1], latents[:, 0])


@pytest.mark.slow
def test_a_curve_arrives_where_a_line_leaves_the_circle(arc):
    latents, whitening, angle, height = arc
    found = fit_attribute_map(latents, whitening, [angle, height])
    assert found.scores.min() > 0.95
    faces = latents[np.abs(angle.values) < 0.7][:200]
    start = angle_of(faces)
    wanted = np.std(angle.values)
    moved = found.move(faces, 0, np.ones(len(faces)))
    change = angle_of(moved) - start
    assert np.mean(change) == pytest.approx(wanted, rel=0.15)
    assert np.abs(np.linalg.norm(moved[:, :2], axis=1) - 2).mean() < 0.3  # still on the circle
    assert np.abs(moved[:, 2] - faces[:, 2]).mean() < 0.15  # the height is kept
    line = fit_direction(latents, whitening, angle, [height], method="mean")
    straight = np.stack([line.edit(face, [1.0])[0] for face in faces])
    assert np.abs(np.linalg.norm(straight[:, :2], axis=1) - 2).mean() > 0.4
    np.testing.assert_array_equal(Curve("angle", found).edit(faces[0], [0.0])[0], faces[0])
    np.testing.assert_allclose(found.gains, 1, atol=0.15)


@pytest.mark.slow
def test_the_gain_makes_up_for_what_latents_hold_in_part(arc):
    latents, whitening, angle, _ = arc
    values = latents[:, 3] + np.random.default_rng(1).normal(size=IMAGES)  # half of its variance is in the latents
    found = fit_attribute_map(latents, whitening, [Labels("half", False, values), angle])
    assert found.scores[0] == pytest.approx(0.5, abs=0.1)
    assert found.gains[0] == pytest.approx(2.0, rel=0.2)


@pytest.mark.slow
def test_the_gain_is_that_of_moves_from_face_to_face():
    """Pink lies next to rose on the wheel of colors, at the other end; and glasses are worn or not."""
    generator = np.random.default_rng(0)
    color, worn = generator.uniform(-2.8, 2.8, IMAGES), (generator.uniform(size=IMAGES) < 0.2).astype(float)
    rest = generator.normal(size=IMAGES)
    latents = np.stack([2 * np.cos(color), 2 * np.sin(color), rest, rest * worn + 3 * worn], axis=1)
    latents = (latents + 0.05 * generator.normal(size=latents.shape)).astype(np.float32)
    whitening = Whitening.of(moments_of(latents, np.full_like(latents, -6.0)))
    found = fit_attribute_map(latents, whitening, [Labels("color", False, color), Labels("worn", True, worn)])
    np.testing.assert_allclose(found.gains, 1, atol=0.1)


@pytest.mark.slow
def test_one_attribute_alone(arc):
    latents, whitening, _, height = arc
    found = fit_attribute_map(latents, whitening, [height])
    moved = Curve("height", found).edit(latents[0], [-1.0, 1.0])
    assert moved[1, 2] - moved[0, 2] == pytest.approx(2 * np.std(height.values), rel=0.1)


def test_a_curve_is_kept_and_shared(tiny_config, tmp_path, monkeypatch):
    trained = random_model(tiny_config, tmp_path)
    monkeypatch.setattr(edit_curves, "MAX_EPOCHS", 3)  # how well it is fitted does not matter here
    first = edit_curves.curve_of(trained, "skin_tone", keep=["background"])
    monkeypatch.setattr(edit_curves, "fit_attribute_map", None)  # nothing is fitted again
    latent = np.zeros(8, np.float32)
    again = edit_curves.curve_of(trained, "skin_tone", keep=["background"])
    np.testing.assert_array_equal(again.edit(latent, [1.0]), first.edit(latent, [1.0]))
    other = edit_curves.curve_of(trained, "background", keep=["skin_tone"])
    assert not np.allclose(other.edit(latent, [1.0]), first.edit(latent, [1.0]))
    assert "skin_tone" in again.describe()
    with pytest.raises(UserError, match="skin_ton"):
        edit_curves.curve_of(trained, "skin_ton")
