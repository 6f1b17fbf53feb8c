"""Drawn faces: pure functions of the index and of the attributes, and every attribute shows."""

import hashlib

import numpy as np
import pytest

from facevae_jax.data.drawn import drawing, synthetic

NAMES = [attribute.name for attribute in synthetic.ATTRIBUTES]
PLAIN = {
    attribute.name: (attribute.low + attribute.high) / 2 if attribute.kind == "continuous" else 0.0
    for attribute in synthetic.ATTRIBUTES
}


def draw_variants(*changes: dict[str, float]) -> np.ndarray:
    """The plain face with each of the changes, as float32 so that differences do not wrap."""
    values = {name: np.array([change.get(name, PLAIN[name]) for change in changes]) for name in NAMES}
    return synthetic.draw(values, resolution=64).astype(np.float32)


def extreme_attributes(count: int) -> dict[str, np.ndarray]:
    """Faces with most attributes at an end of their range, where geometry is most likely to leave its box."""
    generator = np.random.default_rng(0)
    return {
        attribute.name: attribute.low + (attribute.high - attribute.low) * generator.choice([0, 0, 0.4, 1, 1], count)
        for attribute in synthetic.ATTRIBUTES
    }


@pytest.mark.parametrize("resolution", [33, 64])
def test_face_does_not_depend_on_its_batch(resolution):
    indices = np.array([5, 2**40 - 1, 0, 17, 5, 1234567, *range(100, 130)])
    batch = synthetic.faces(indices, resolution=resolution)
    alone = [synthetic.faces(indices[row : row + 1], resolution=resolution)[0] for row in range(len(indices))]
    np.testing.assert_array_equal(batch, np.stack(alone))
    assert batch.shape == (len(indices), resolution, resolution, 3)
    assert batch.dtype == np.uint8


def test_layers_stay_inside_their_boxes(monkeypatch):
    # A batch shares its boxes, so one too small cuts a layer off, less so in a larger batch. Alone it shows most.
    values = extreme_attributes(150)
    rows = ({name: value[row : row + 1] for name, value in values.items()} for row in range(150))
    alone = [synthetic.draw(row, resolution=64) for row in rows]
    span = drawing.Canvas._span

    def whole(canvas, low, high, start):
        return slice(0, 64) if isinstance(low, np.ndarray) else span(canvas, low, high, start=start)

    monkeypatch.setattr(drawing.Canvas, "_span", whole)
    np.testing.assert_array_equal(np.concatenate(alone), synthetic.draw(values, resolution=64))


def test_no_pixel_ever_changes():
    """Datasets of one VERSION have the same pictures, whatever the machine."""
    digest = hashlib.sha256(synthetic.faces(np.arange(64), resolution=64).tobytes()).hexdigest()
    assert digest == "db806df824ada6ff5aa8970fbbfef4d4870e0b709ae1cf20ee6fc73b665a6074"


def test_attributes_depend_on_index_and_name_only():
    indices = np.arange(1000)
    values = synthetic.attributes(indices)
    order = np.random.default_rng(0).permutation(1000)
    shuffled = synthetic.attributes(indices[order])
    other = synthetic.attributes(indices + 1000)
    for name in NAMES:
        np.testing.assert_array_equal(shuffled[name], values[name][order])
        assert np.mean(other[name] == values[name]) < 0.75  # binary ones agree by chance
    table = np.stack([*values.values(), *other.values()])
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 0.15  # 4.7 standard deviations of 1000 independent draws


@pytest.mark.parametrize("attribute", synthetic.ATTRIBUTES, ids=NAMES)
def test_attribute_has_its_declared_distribution(attribute):
    values = synthetic.attributes(np.arange(2**40, 2**40 + 20000))[attribute.name]
    assert values.dtype == np.float32
    if attribute.kind == "binary":
        assert set(np.unique(values)) == {0, 1}
        assert values.mean() == pytest.approx(attribute.frequency, abs=0.015)
    else:
        assert attribute.low <= values.min()
        assert values.max() <= attribute.high
        counts, _ = np.histogram(values, bins=10, range=(attribute.low, attribute.high))
        np.testing.assert_allclose(counts / 20000, 0.1, atol=0.012)


def test_resolutions_agree():
    values = extreme_attributes(24)
    small = synthetic.draw(values, resolution=64).astype(np.float32)
    large = synthetic.draw(values, resolution=128).astype(np.float32)
    averaged = large.reshape(24, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 0.8  # of 255; 0.70 measured
    assert np.quantile(np.abs(averaged - small), 0.999) < 32  # a doubled or shifted edge hides in the mean


@pytest.mark.parametrize("attribute", synthetic.ATTRIBUTES, ids=NAMES)
def test_attribute_changes_the_picture_smoothly(attribute):
    steps = np.linspace(attribute.low, attribute.high, 41)
    long_hair = {"hair_length": 0.7} if attribute.name == "hair_curl" else {}
    pictures = draw_variants(*({**long_hair, attribute.name: step} for step in steps))
    change = np.abs(pictures[-1] - pictures[0])
    assert change.mean() > 0.08  # of 255; the eyes' color and the nose are small at 64x64
    assert (change.max(-1) > 8).sum() > 8
    # Forty steps cover the range: none of them may jump.
    path = np.abs(np.diff(pictures, axis=0)).mean((1, 2, 3))
    assert path.max() < 3 * path.mean()
    assert path.min() > 0


@pytest.mark.parametrize(
    "change", [{}, {"glasses": 1, "hair_length": 0.8, "hair_curl": 1}, {"beard": 1, "hair_length": 0}]
)
def test_turned_faces_mirror_each_other(change):
    left, right = draw_variants({**change, "turn": -20}, {**change, "turn": 20})
    assert np.abs(left - right).mean() > 3
    assert np.abs(left - right[:, ::-1]).max() <= 1  # rounding may differ: a mirrored sum adds in another order


def test_no_faces_and_values_and_requests_out_of_range():
    np.testing.assert_array_equal(*draw_variants({"skin_tone": 6}, {"skin_tone": 1}))
    assert synthetic.faces(np.array([], np.int64), resolution=32).shape == (0, 32, 32, 3)
    values = synthetic.attributes(np.arange(1))
    with pytest.raises(ValueError, match="smiel"):
        synthetic.draw({**values, "smiel": values["smile"]}, resolution=32)
    del values["smile"]
    with pytest.raises(ValueError, match="smile"):
        synthetic.draw(values, resolution=32)
