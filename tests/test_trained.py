"""A trained model as an object: encode, decode, sample, load; and what it refuses."""

import json
import pathlib

import numpy as np
import pytest
from PIL import ExifTags, Image

import facevae_jax
from facevae_jax.core.errors import UserError

SIDE = 32


def test_encode_and_decode(trained):
    originals = np.asarray(trained.dataset.images("validation"))
    assert (trained.resolution, trained.code_shape, trained.code_size) == (SIDE, (8,), 8)
    posterior = trained.encode(originals)
    assert posterior.mean.shape == posterior.log_variance.shape == (37, 8)
    np.testing.assert_array_equal(trained.decode(posterior.mean), trained.reconstruct(originals))
    floats = trained.encode(originals.astype(np.float32) / 255)
    np.testing.assert_allclose(floats.mean, posterior.mean, atol=1e-5)
    assert trained.encode(originals[:0]).mean.shape == (0, 8)


def test_posterior_samples_have_their_mean_and_deviation(trained):
    posterior = trained.encode(trained.dataset.images("validation")[:2])
    repeated = type(posterior)(*(np.tile(part, (2000, 1)) for part in posterior))
    drawn = trained.posterior_sample(repeated).reshape(2000, 2, 8)
    deviation = np.exp(0.5 * posterior.log_variance)
    np.testing.assert_allclose(drawn.mean(0), posterior.mean, atol=0.15 * deviation.max())
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.1)
    np.testing.assert_array_equal(
        trained.posterior_sample(posterior, seed=3)[1:],
        trained.posterior_sample(type(posterior)(*(part[1:] for part in posterior)), seed=3, first=1),
    )


def test_temperature_zero_gives_the_mean_face(trained):
    codes = trained.sample_codes(3, prior="gaussian", temperature=0.0)
    np.testing.assert_allclose(codes, np.tile(trained.moments.mean, (3, 1)), atol=1e-6)
    with pytest.raises(UserError, match="temperature=-1"):
        trained.sample_codes(3, temperature=-1.0)
    with pytest.raises(UserError, match="prior='gausian'"):
        trained.sample_codes(3, prior="gausian")


@pytest.mark.parametrize(
    ("shape", "dtype", "value"),
    [
        ((2, 64, 64, 3), np.uint8, 0),
        ((2, SIDE, SIDE, 1), np.uint8, 0),
        ((1, SIDE, SIDE, 3), np.float64, 7.0),
        ((1, SIDE, SIDE, 3), np.int32, 7),
    ],
)
def test_other_images_are_refused(trained, shape, dtype, value):
    with pytest.raises(UserError, match=r"32, 32, 3\]|int32|float64"):
        trained.check_images(np.full(shape, value, dtype))


@pytest.mark.parametrize("codes", [np.zeros((3, 9)), np.full((1, 8), np.nan), np.zeros((1, 8), "U1"), np.zeros(())])
def test_other_codes_are_refused(trained, codes):
    with pytest.raises(UserError, match="codes"):
        trained.check_codes(codes)


def test_photographs_are_cropped_as_in_training(tmp_path):
    random = np.random.default_rng(0)
    aligned = random.integers(0, 255, (218, 178, 3), np.uint8)
    Image.fromarray(aligned).save(tmp_path / "celeba.png")
    Image.fromarray(aligned[35:183, 15:163]).save(tmp_path / "square.png")
    read = facevae_jax.read_faces(tmp_path, resolution=SIDE)
    assert [pathlib.Path(name).stem for name in read.names] == ["celeba", "square"]
    np.testing.assert_array_equal(read.images[0], read.images[1])
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # lies on its side, as cameras store portraits
    Image.fromarray(np.rot90(aligned)).save(tmp_path / "lying.png", exif=turned)
    lying = facevae_jax.read_faces(tmp_path / "lying.png", resolution=SIDE)
    np.testing.assert_array_equal(lying.images[0], read.images[0])


def test_a_run_of_an_unknown_kind_is_refused(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["kind"] = "diffusion"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.model\.kind"):
        facevae_jax.load(tmp_path)
