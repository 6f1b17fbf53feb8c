"""Every metric against an independent implementation or a closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from facevae_jax.config import ObjectiveConfig
from facevae_jax.core.errors import UserError
from facevae_jax.inference import Inference
from facevae_jax.latents.moments import Moments, moments_of
from facevae_jax.metrics import comparison, frechet, images, inception, likelihood, scores
from facevae_jax.models.likelihoods import make_likelihood
from tests import test_extending as examples
from tests.test_baselines import LinearGaussian


def pictures(side):
    """Four smooth pictures, noisy copies of them, one of which is exact and one of which is something else."""
    generator = np.random.default_rng(0)
    coarse = generator.uniform(size=(4, 8, 8, 3))
    smooth = np.asarray(jax.image.resize(coarse, (4, side, side, 3), "cubic")).clip(0, 1).astype(np.float32)
    noise = generator.normal(size=smooth.shape) * np.reshape([0.02, 0.2, 0.0, 0.1], (4, 1, 1, 1))
    noisy = (smooth + noise).clip(0, 1)
    noisy[3] = 1 - noisy[3]
    return smooth, noisy.astype(np.float32)


def _reference_ms_ssim(a, b):
    """Wang, Simoncelli & Bovik 2003 by scipy, one picture at a time, in float64."""
    from scipy.ndimage import correlate1d

    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def blur(x):
        return correlate1d(correlate1d(x, window, axis=0), window, axis=1)[5:-5, 5:-5]

    a, b, factors = a.astype(np.float64), b.astype(np.float64), []
    while min(a.shape[:2]) >= 11 and len(factors) < 5:
        mean_a, mean_b = blur(a), blur(b)
        variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        contrast = (2 * (blur(a * b) - mean_a * mean_b) + 0.03**2) / (variance_a + variance_b + 0.03**2)
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        factors.append((contrast.mean(), (contrast * luminance).mean()))
        a, b = (x[::2, ::2] / 4 + x[1::2, ::2] / 4 + x[::2, 1::2] / 4 + x[1::2, 1::2] / 4 for x in (a, b))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][: len(factors)])
    values = [contrast for contrast, _ in factors[:-1]] + [factors[-1][1]]
    return len(factors), float(np.prod(np.maximum(values, 0) ** (weights / weights.sum())))


@pytest.mark.parametrize(("side", "scales"), [(32, 2), (64, 3), (128, 4), (256, 5)])
def test_image_scores_equal_scikit_images_and_a_plain_ms_ssim(side, scales):
    a, b = pictures(side)
    assert images.scales(side) == scales
    scores = jax.jit(images.image_scores)(a, b)
    for i in range(4):
        options = {"win_size": 11, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, whole = structural_similarity(a[i], b[i], channel_axis=2, data_range=1.0, full=True, **options)
        valid = whole[5:-5, 5:-5]  # scikit-image pads, and crops by a radius of its own
        assert scores.ssim[i] == pytest.approx(valid.mean(), abs=2e-5)
        assert scores.mse[i] == pytest.approx(mean_squared_error(a[i], b[i]), rel=1e-5, abs=1e-12)
        if i != 2:
            assert scores.psnr[i] == pytest.approx(peak_signal_noise_ratio(a[i], b[i], data_range=1.0), abs=1e-3)
        count, expected = _reference_ms_ssim(a[i], b[i])
        assert count == scales
        assert scores.ms_ssim[i] == pytest.approx(expected, abs=5e-5)
    assert scores.psnr[2] == pytest.approx(100.0)
    assert scores.ssim[2] == pytest.approx(1.0)
    assert scores.ms_ssim[2] == pytest.approx(1.0)
    assert scores.ms_ssim[3] == 0.0  # of a negative: structures that are opposite


def test_frechet_distance_of_gaussians():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6))
    b = generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6)) + generator.normal(size=6)
    mean, covariances = a.mean(axis=0) - b.mean(axis=0), (np.cov(a.T), np.cov(b.T))
    cross = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = mean @ mean + np.trace(covariances[0] + covariances[1] - 2 * cross)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet.frechet_distance(a, a + 2.0) == pytest.approx(4.0 * 6)  # equal covariances: the means alone
    centered = a - a.mean(axis=0)
    assert frechet.frechet_distance(centered, 3 * centered) == pytest.approx(4 * np.trace(covariances[0]))
    assert frechet.frechet_distance(a[:4], a[:4]) == pytest.approx(0, abs=1e-6)  # singular


def test_kernel_distance_is_its_definition():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(5, 3)), generator.normal(size=(4, 3)) + 1

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert frechet.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across)


def test_features_of_a_users_function():
    batches = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), np.uint8)
    found = frechet.features_of(lambda x: x.reshape(len(x), -1)[:, :5], batches)
    np.testing.assert_array_equal(found, batches.reshape(12, -1)[:, :5])
    assert frechet.named_extractor("numpy.linalg:norm") is np.linalg.norm
    for name in ("numpy", "nowhere.at_all:f", "numpy:no_such", "numpy:pi"):
        with pytest.raises(UserError, match=f"features='{name}'"):
            frechet.named_extractor(name)
    with pytest.raises(UserError, match=r"shape \[2\] for 4 images"):
        frechet.features_of(lambda x: x[:2, 0, 0, 0], batches)
    with pytest.raises(UserError, match="finite"):
        frechet.features_of(lambda x: np.full((len(x), 2), np.nan), batches)


def test_paths_between_faces():
    pace = np.linspace(0, 1, 5)[:, None]
    straight = comparison.path_scores(np.stack([pace * [3.0, 4.0], pace * [0.0, 1.0] + 7]))
    assert straight == pytest.approx((1.0, 1.0))
    # Round a half circle of radius 1: pi to 2, in steps that are chords.
    angle = np.pi * np.linspace(0, 1, 1001)
    circle = comparison.path_scores(np.stack([np.cos(angle), np.sin(angle)], axis=1)[None])
    assert circle == pytest.approx((np.pi / 2, 1.0), rel=1e-5)
    # All at once in one of four steps; and a way that ends where it began, which has no distance to compare with.
    jump = np.array([[[0.0], [0], [1], [1], [1]], [[0], [2], [2], [1], [0]]])
    assert comparison.path_scores(jump) == pytest.approx((1.0, 4.0))
    assert comparison.path_scores(np.ones((2, 4, 3))) is None  # a decoder that looks at no latent


def test_the_aggregate_posteriors_distance_to_the_prior():
    generator = np.random.default_rng(0)
    mean, log_variance = generator.normal(size=(500, 3)) * [1, 2, 0] + [0, 1, 0], generator.normal(size=(500, 3))
    moments = moments_of(mean, log_variance)
    # Against the density ratio of draws from that Gaussian.
    gaussian = scipy.stats.multivariate_normal(moments.mean, moments.covariance)
    sampled = gaussian.rvs(200_000, random_state=1)
    ratio = gaussian.logpdf(sampled) - scipy.stats.multivariate_normal(np.zeros(3), np.eye(3)).logpdf(sampled)
    assert scores.gaussian_kl_to_prior(moments) == pytest.approx(ratio.mean(), rel=0.01)
    assert scores.gaussian_kl_to_prior(Moments(np.zeros(3), np.eye(3), 1)) == pytest.approx(0)


@pytest.fixture(scope="module")
def linear():
    """p(x | z) = N(W z + b, variance), whose likelihood is known (Tipping & Bishop 1999); its parameters and variance.

    Its posterior is a poor one, as of a network that is not trained to the end: the bound has something to gain.
    """
    generator, variance = np.random.default_rng(0), 0.05
    weight, bias = 0.3 * generator.normal(size=(12, 2)), generator.uniform(size=12)
    inverse = np.linalg.inv(np.eye(2) + weight.T @ weight / variance)
    projection = weight @ inverse / variance
    encoder = {  # of the mean, and of a log variance that is the same for all images
        "kernel": np.concatenate([projection, np.zeros((12, 2))], axis=1),
        "bias": np.concatenate([0.3 - bias @ projection, np.log(np.diag(inverse)) + 0.5]),
    }
    return {"encoder": encoder, "decoder": {"kernel": weight.T, "bias": bias}}, variance


@pytest.fixture(scope="module")
def bounds(linear):
    """Images of that model, and the bounds of their likelihoods."""
    (parameters, variance), generator = linear, np.random.default_rng(1)
    mean = generator.normal(size=(8, 2)) @ parameters["decoder"]["kernel"] + parameters["decoder"]["bias"]
    given = (mean + generator.normal(scale=math.sqrt(variance), size=mean.shape)).astype(np.float32)
    variables = {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), parameters)}
    with pytest.MonkeyPatch.context() as patched:
        example = examples.example("A model", patched)
    model = example.Linear(example.Config(latent_dim=2), 2, LinearGaussian(12))
    found = likelihood.importance_bounds(
        Inference(model, variables, batch_size=64),
        given.reshape(8, 2, 2, 3),
        likelihood=make_likelihood(ObjectiveConfig(likelihood="gaussian"), model.image_shape),
        variance=variance,
        draws=(1, 10, 100, 1000, 20_000),
    )
    return given, found


def test_the_importance_bound_grows_with_the_draws_to_the_likelihood(linear, bounds):
    (parameters, variance), (given, found) = linear, bounds
    values = np.stack(list(found.values()))
    assert np.all(np.diff(values, axis=0) >= 0)  # of each image, by the way smaller numbers of draws share them
    decoder = parameters["decoder"]
    covariance = decoder["kernel"].T @ decoder["kernel"] + variance * np.eye(12)
    gap = scipy.stats.multivariate_normal(decoder["bias"], covariance).logpdf(given) - values
    assert gap[0].min() > 0.3
    assert np.abs(gap[-1]).max() < 0.03
    assert np.abs(gap[-1].mean()) < 0.01


def test_one_draw_is_the_elbo(linear, bounds):
    (parameters, variance), (given, found) = linear, bounds
    encoder, decoder = parameters["encoder"], parameters["decoder"]
    mean, log_variance = np.split(given @ encoder["kernel"] + encoder["bias"], 2, axis=1)
    spread = np.exp(log_variance[0])
    kl = 0.5 * (mean**2 + spread - 1 - np.log(spread)).sum(axis=1)
    # E|x - W z - b|^2 under the posterior, in closed form.
    error = ((given - mean @ decoder["kernel"] - decoder["bias"]) ** 2).sum(axis=1)
    error += spread @ (decoder["kernel"] ** 2).sum(axis=1)
    elbo = -0.5 * (12 * math.log(2 * math.pi * variance) + error / variance) - kl
    np.testing.assert_allclose(found[1].mean(), elbo.mean(), atol=0.1)  # of 8 x 20,000 draws


def test_draws_that_cannot_be_grouped_are_refused():
    for draws in ((), (0, 10), (1, 10, 15), (10, 1), (5, 5)):
        with pytest.raises(UserError, match="importance_samples="):
            likelihood.check_draws(draws)


def test_other_weights_than_the_published_ones_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"a pickle that runs something")
    with pytest.raises(UserError, match=r"weights\.pth.*6726825d"):
        inception.check_weights(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        inception.check_weights(tmp_path / "nowhere.pth")


@pytest.mark.slow
def test_fid_and_kid_of_a_small_extractor():
    """The path to torch-fidelity, with a network of its registry that needs no download."""
    torch = pytest.importorskip("torch", reason="the extra `fid` is not installed")
    fidelity = pytest.importorskip("torch_fidelity", reason="the extra `fid` is not installed")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Channels(FeatureExtractorBase):
        """Mean and standard deviation of each channel."""

        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("moments",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "moments"

        def forward(self, x):
            flat = x.double().flatten(2) / 255
            return (torch.cat([flat.mean(2), flat.std(2)], dim=1),)

    fidelity.register_feature_extractor("channels", Channels)
    made = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), np.uint8)
    real = made[::-1] // 2 + 64
    found = inception.fidelity(np.split(made, 4), np.split(real, 3), count=48, resolution=8, extractor="channels")

    def features(x):
        flat = x.reshape(48, 64, 3) / 255
        return np.concatenate([flat.mean(1), flat.std(1, ddof=1)], axis=1)

    assert found["fid"] == pytest.approx(frechet.frechet_distance(features(made), features(real)), rel=1e-4)
    # Each subset is the whole set.
    assert found["kid"] == pytest.approx(frechet.kernel_distance(features(made), features(real)), rel=1e-3)
