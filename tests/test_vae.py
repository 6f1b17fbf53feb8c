import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gdl128
from facevae_jax.config import RunConfig
from facevae_jax.models import vae
from facevae_jax.models.api import LOG_VARIANCE_RANGE, Execution, Gaussian, image_keys, to_pixels, to_unit
from facevae_jax.models.likelihoods import GaussianLikelihood
from facevae_jax.models.vae import VAE
from facevae_jax.training.setup import make_model

KEYS = image_keys(jax.random.key(2), 2)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))


def make(form="plain", **settings):
    """A small model and its variables."""
    model = VAE(vae.Config(latent_dim=4, **settings), 32, GaussianLikelihood(32 * 32 * 3), Execution(form))
    return model, jax.jit(lambda key: model.init(key, IMAGES, KEYS, train=False))(jax.random.key(1))


@pytest.fixture(scope="module")
def lineage():
    config = RunConfig.from_config_dict(gdl128.get_config())
    model, _ = make_model(config, Execution())
    return (
        config,
        model,
        jax.jit(lambda k: model.init(k, jnp.zeros((1, 128, 128, 3)), KEYS[:1], train=False))(jax.random.key(0)),
    )


@pytest.fixture
def keras_ranks():
    """Keras promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_lineage_has_the_papers_parameters(lineage):
    _, _, variables = lineage
    assert size(variables["params"]) == 2_649_299
    assert size(variables) == 2_650_067


def keras_lineage(config, variables):
    """Encoder, of pixels from 0 to 255, and decoder in Keras, with Flax's variables, layer by layer in order."""
    from benchmarks.peers import keras_vae

    network = keras_vae.VAE(config)
    for name in ("encoder", "decoder"):
        params, batch_stats = (variables[kind][name] for kind in ("params", "batch_stats"))
        dense = ["mean", "log_variance"] if name == "encoder" else ["Dense_0"]
        seen: dict[str, int] = {}
        for layer in getattr(network, name).layers:
            kind = type(layer).__name__
            index = seen[kind] = seen.get(kind, -1) + 1
            sources = {
                "Conv2D": f"StridedConvolution_{index}",
                "Conv2DTranspose": f"TransposedConvolution_{index}",
                "Dense": dense[index % len(dense)],
            }
            if kind in sources:
                source = params[sources[kind]]
                layer.set_weights([source["kernel"], source["bias"]])
            elif kind == "BatchNormalization":
                affine, running = (part[f"Stage_{index}"]["BatchNorm_0"] for part in (params, batch_stats))
                layer.set_weights([affine["scale"], affine["bias"], running["mean"], running["var"]])
    return network.encoder, network.decoder


@pytest.mark.usefixtures("keras_ranks")
@pytest.mark.parametrize("form", ["plain", "matmul"])
def test_lineage_equals_keras(lineage, form):
    config, model, variables = lineage
    random = np.random.default_rng(0)

    def away_from_zeros_and_ones(path, leaf):
        # So that every variable counts, and such that activations neither vanish nor grow until the sigmoid and the
        # bounds of the log variance hide every difference.
        low, high = (-0.7, -0.5) if path[-1].key == "var" else (-0.02, 0.02)
        return leaf + random.uniform(low, high, leaf.shape)

    variables = jax.tree_util.tree_map_with_path(away_from_zeros_and_ones, variables)
    model = model.clone(execution=Execution(form))
    encoder, decoder = keras_lineage(config, variables)
    images = random.uniform(size=(3, 128, 128, 3)).astype(np.float32)
    latents = random.normal(size=(3, 200)).astype(np.float32)
    posterior = model.apply(variables, jnp.asarray(images), method="encode")
    mean, log_variance = (np.asarray(part) for part in encoder(255 * images, training=False))
    reconstruction = np.asarray(decoder(latents))
    assert LOG_VARIANCE_RANGE[0] < log_variance.min() < log_variance.max() < LOG_VARIANCE_RANGE[1]
    assert min(mean.std(), log_variance.std(), reconstruction.std()) > 0.01
    assert 0.01 < reconstruction.min() < reconstruction.max() < 0.99
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-5, rtol=0)
    np.testing.assert_allclose(posterior.log_variance, log_variance, atol=1e-5, rtol=0)
    decoded = model.apply(variables, jnp.asarray(latents), method="decode").mean
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("keras_ranks")
def test_lineage_moves_its_running_statistics_as_keras(lineage):
    config, model, variables = lineage
    encoder, _ = keras_lineage(config, variables)
    images = np.random.default_rng(1).uniform(size=(4, 128, 128, 3)).astype(np.float32)
    keys = image_keys(jax.random.key(1), 4)
    _, updates = model.apply(variables, jnp.asarray(images), keys, train=True, mutable=["batch_stats"])
    encoder(255 * images, training=True)
    keras_statistics = next(layer for layer in encoder.layers if type(layer).__name__ == "BatchNormalization")
    running = updates["batch_stats"]["encoder"]["Stage_0"]["BatchNorm_0"]  # before any dropout
    np.testing.assert_allclose(running["mean"], np.asarray(keras_statistics.moving_mean), atol=1e-6)
    np.testing.assert_allclose(running["var"], np.asarray(keras_statistics.moving_variance), atol=1e-6)
    assert not np.allclose(running["mean"], 0.0)


@pytest.mark.parametrize(
    ("activation", "normalization"), [("leaky_relu", "batch"), ("relu", "none"), ("silu", "group"), ("gelu", "group")]
)
def test_every_choice_reconstructs_in_range(normalization, activation):
    model, variables = make("matmul", normalization=normalization, activation=activation, dropout_rate=0.2)
    assert ("batch_stats" in variables) == (normalization == "batch")
    output, _ = model.apply(variables, IMAGES, KEYS, train=True, mutable=["batch_stats"])
    decoded = output.decoded.mean
    assert (decoded.shape, decoded.dtype) == (IMAGES.shape, jnp.float32)
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1
    assert output.latents[0].posterior.mean.shape == (2, *model.code_shape)


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_outputs_in_float32():
    model, variables = make(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    output = model.apply(variables, IMAGES, KEYS, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    exact = make()[0].apply(variables, IMAGES, KEYS, train=False).decoded.mean
    np.testing.assert_allclose(output.decoded.mean, exact, atol=0.05)
    assert not np.array_equal(output.decoded.mean, exact)  # it did compute in bfloat16


def test_dropout_acts_in_training_only_and_on_each_image_by_its_own_key():
    model, variables = make(dropout_rate=0.5, normalization="none")

    def encode(train, keys, images=IMAGES):
        return model.apply(variables, images, keys, train=train).latents[0].posterior.mean

    others = jnp.stack([KEYS[0], jax.random.key(5)])
    assert not np.allclose(encode(True, KEYS)[1], encode(True, others)[1])
    np.testing.assert_array_equal(encode(True, KEYS)[0], encode(True, others)[0])
    np.testing.assert_allclose(encode(True, KEYS[::-1], IMAGES[::-1]), encode(True, KEYS)[::-1], atol=1e-5)
    np.testing.assert_array_equal(encode(False, KEYS), encode(False, others))


def test_posterior_samples_have_its_moments():
    posterior = Gaussian(jnp.full((50_000, 2), 3.0), jnp.full((50_000, 2), jnp.log(4.0)))
    sample = posterior.sample(image_keys(jax.random.key(0), 50_000))
    np.testing.assert_allclose(sample.mean(axis=0), 3.0, atol=0.05)
    np.testing.assert_allclose(sample.std(axis=0), 2.0, rtol=0.02)


def test_log_variance_is_bounded():
    model, variables = make()
    head = variables["params"]["encoder"]["log_variance"]
    head["kernel"], head["bias"] = 1e6 * head["kernel"], 1e6 * jnp.array([1.0, -1.0, 1.0, -1.0])
    output = model.apply(variables, jnp.ones((2, 32, 32, 3)), KEYS, train=False)
    log_variance = output.latents[0].posterior.log_variance
    assert (float(log_variance.min()), float(log_variance.max())) == LOG_VARIANCE_RANGE
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


def test_every_pixel_value_survives_the_way_there_and_back():
    values = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_pixels(to_unit(values)), values)
