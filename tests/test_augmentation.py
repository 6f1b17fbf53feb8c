import jax
import jax.numpy as jnp
import numpy as np

from facevae_jax.data.batches import Batch, dequantize, random_flip

IMAGES = np.random.default_rng(0).integers(0, 256, (64, 4, 6, 3), np.uint8)
ROWS = np.arange(100, 164, dtype=np.int32)


def flipped(images, rows, *, seed=0, step=0):
    return np.asarray(random_flip(Batch(jnp.asarray(images), jnp.asarray(rows)), seed=seed, step=step))


def dequantized(images, rows, *, seed=0, stream="a", step=0):
    return np.asarray(dequantize(jnp.asarray(images), jnp.asarray(rows), seed=seed, stream=stream, step=step))


def is_flipped(rows, **keys):
    """Of images that are not their own mirror image."""
    images = IMAGES[np.asarray(rows) % 64]
    result = flipped(images, rows, **keys)
    mirrored = np.array([(after == before[:, ::-1]).all() for after, before in zip(result, images, strict=True)])
    kept = np.array([(after == before).all() for after, before in zip(result, images, strict=True)])
    assert (mirrored != kept).all()
    return mirrored


def test_half_of_the_images_are_mirrored_left_to_right():
    rows = np.arange(4096, dtype=np.int32)
    assert abs(is_flipped(rows).mean() - 0.5) < 0.03  # four standard errors


def test_what_happens_to_a_row_depends_on_seed_step_and_row_alone():
    expected = is_flipped(ROWS)
    shuffled = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(is_flipped(ROWS[shuffled]), expected[shuffled])
    np.testing.assert_array_equal(is_flipped(ROWS[10:20]), expected[10:20])
    for other in ({"seed": 1}, {"step": 1}):
        assert 10 < (is_flipped(ROWS, **other) != expected).sum() < 54
    noise = dequantized(IMAGES, ROWS, step=3)
    part = dequantized(IMAGES[shuffled[:5]], ROWS[shuffled[:5]], step=3)
    np.testing.assert_array_equal(part, noise[shuffled[:5]])
    for other in ({"seed": 1}, {"step": 4}, {"stream": "b"}):
        assert (dequantized(IMAGES, ROWS, **{"step": 3} | other) != noise).mean() > 0.99


def test_noise_is_uniform_over_the_gray_level():
    levels = np.array([0, 128, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (3, 100, 100, 3))
    values = dequantized(images, ROWS[:3]) * 256 - levels[:, None, None, None]
    assert values.min() >= 0
    assert values.max() <= 1
    for noise in values:
        counts = np.histogram(noise, bins=10, range=(0, 1))[0]
        assert (abs(counts - 3000) < 4 * 3000**0.5).all()
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 4 / 30_000**0.5


def test_devices_change_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(Batch(jnp.asarray(IMAGES), jnp.asarray(ROWS)), sharding)
    np.testing.assert_array_equal(jax.jit(lambda b: random_flip(b, seed=0, step=0))(batch), flipped(IMAGES, ROWS))
    sharded = jax.jit(lambda b: dequantize(*b, seed=0, stream="a", step=0))(batch)
    np.testing.assert_array_equal(sharded, dequantized(IMAGES, ROWS))
