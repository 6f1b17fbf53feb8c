import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facevae_jax.config import ModelConfig, RunConfig
from facevae_jax.models.vae import LOG_VARIANCE_RANGE, VAE, Execution, Posterior, to_pixels, to_unit
from tests.conftest import REPOSITORY
from tests.test_config import load

NOISE = jax.random.normal(jax.random.key(2), (2, 4))


@pytest.fixture(scope="module")
def lineage():
    config = RunConfig.from_config_dict(load(REPOSITORY / "configs/gdl128.py"))
    model = VAE(config.model, config.data.resolution, Execution("plain"))
    key = jax.random.key(0)
    variables = jax.jit(lambda: model.init(key, jnp.zeros((1, 128, 128, 3)), jnp.zeros((1, 200)), train=False))()
    return model, variables


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_lineage_has_the_papers_parameters(lineage):
    _, variables = lineage
    assert size(variables["params"]) == 2_649_299
    assert size(variables) == 2_650_067


def keras_lineage():
    """Foster, Generative Deep Learning, 1st edition, chapter 3, `VariationalAutoencoder` with its face settings."""
    import keras
    from keras import layers

    filters, decoder_filters = (32, 64, 64, 64), (64, 64, 32, 3)
    x = image = keras.Input((128, 128, 3))
    for count in filters:
        x = layers.Conv2D(count, 3, strides=2, padding="same")(x)
        x = layers.BatchNormalization()(x)
        x = layers.LeakyReLU(negative_slope=0.3)(x)
        x = layers.Dropout(0.25)(x)
    x = layers.Flatten()(x)
    encoder = keras.Model(image, [layers.Dense(200, name="mean")(x), layers.Dense(200, name="log_variance")(x)])
    latent = keras.Input((200,))
    x = layers.Reshape((8, 8, 64))(layers.Dense(8 * 8 * 64)(latent))
    for index, count in enumerate(decoder_filters):
        x = layers.Conv2DTranspose(count, 3, strides=2, padding="same")(x)
        if index < len(decoder_filters) - 1:
            x = layers.BatchNormalization()(x)
            x = layers.LeakyReLU(negative_slope=0.3)(x)
            x = layers.Dropout(0.25)(x)
    return encoder, keras.Model(latent, layers.Activation("sigmoid")(x))


def set_keras_weights(model, params, batch_stats):
    """Copies Flax's variables into the Keras model, layer by layer in order."""
    kinds = {"Conv2D": "StridedConvolution", "Conv2DTranspose": "TransposedConvolution"}
    seen: dict[str, int] = {}
    for layer in model.layers:
        kind = type(layer).__name__
        index = seen.get(kind, 0)
        seen[kind] = index + 1
        if kind in kinds:
            source = params[f"{kinds[kind]}_{index}"]
            layer.set_weights([source["kernel"], source["bias"]])
        elif kind == "BatchNormalization":
            affine, running = params[f"Stage_{index}"]["BatchNorm_0"], batch_stats[f"Stage_{index}"]["BatchNorm_0"]
            layer.set_weights([affine["scale"], affine["bias"], running["mean"], running["var"]])
        elif kind == "Dense":
            source = params[layer.name if layer.name in params else "Dense_0"]
            layer.set_weights([source["kernel"], source["bias"]])


@pytest.mark.parametrize("form", ["plain", "matmul"])
def test_lineage_equals_keras(lineage, form):
    model, variables = lineage
    random = np.random.default_rng(0)

    def away_from_zeros_and_ones(path, leaf):
        # So that every variable counts, and such that activations neither vanish nor grow until the sigmoid and the
        # bounds of the log variance hide every difference.
        low, high = (-0.7, -0.5) if path[-1].key == "var" else (-0.02, 0.02)
        return leaf + random.uniform(low, high, leaf.shape)

    variables = jax.tree_util.tree_map_with_path(away_from_zeros_and_ones, variables)
    model = VAE(model.config, model.resolution, Execution(form))
    encoder, decoder = keras_lineage()
    set_keras_weights(encoder, variables["params"]["encoder"], variables["batch_stats"]["encoder"])
    set_keras_weights(decoder, variables["params"]["decoder"], variables["batch_stats"]["decoder"])
    images = random.uniform(size=(3, 128, 128, 3)).astype(np.float32)
    latents = random.normal(size=(3, 200)).astype(np.float32)
    posterior = model.apply(variables, images, method="encode")
    mean, log_variance = (np.asarray(part) for part in encoder(images, training=False))
    reconstruction = np.asarray(decoder(latents))
    assert LOG_VARIANCE_RANGE[0] < log_variance.min() < log_variance.max() < LOG_VARIANCE_RANGE[1]
    assert min(mean.std(), log_variance.std(), reconstruction.std()) > 0.01
    assert 0.01 < reconstruction.min() < reconstruction.max() < 0.99
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-5, rtol=0)
    np.testing.assert_allclose(posterior.log_variance, log_variance, atol=1e-5, rtol=0)
    np.testing.assert_allclose(model.apply(variables, latents, method="decode"), reconstruction, atol=1e-5, rtol=0)


def test_lineage_moves_its_running_statistics_as_keras(lineage):
    model, variables = lineage
    encoder, _ = keras_lineage()
    set_keras_weights(encoder, variables["params"]["encoder"], variables["batch_stats"]["encoder"])
    images = np.random.default_rng(1).uniform(size=(4, 128, 128, 3)).astype(np.float32)
    key = jax.random.key(1)
    noise = jnp.zeros((4, 200))
    _, updates = model.apply(variables, images, noise, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    encoder(images, training=True)
    keras_statistics = next(layer for layer in encoder.layers if type(layer).__name__ == "BatchNormalization")
    running = updates["batch_stats"]["encoder"]["Stage_0"]["BatchNorm_0"]  # before any dropout
    np.testing.assert_allclose(running["mean"], np.asarray(keras_statistics.moving_mean), atol=1e-6)
    np.testing.assert_allclose(running["var"], np.asarray(keras_statistics.moving_variance), atol=1e-6)
    assert not np.allclose(running["mean"], 0.0)


@pytest.mark.parametrize(
    ("activation", "normalization"), [("leaky_relu", "batch"), ("relu", "none"), ("silu", "group"), ("gelu", "group")]
)
def test_every_choice_reconstructs_in_range(normalization, activation):
    config = ModelConfig(latent_dim=4, normalization=normalization, activation=activation, dropout_rate=0.2)
    model = VAE(config, 32, Execution("matmul"))
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    variables = model.init(jax.random.key(1), images, NOISE, train=False)
    assert ("batch_stats" in variables) == (normalization == "batch")
    output, _ = model.apply(
        variables, images, NOISE, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)}
    )
    assert output.reconstruction.shape == images.shape
    assert output.reconstruction.dtype == jnp.float32
    assert float(output.reconstruction.min()) >= 0
    assert float(output.reconstruction.max()) <= 1
    assert output.posterior.mean.shape == (2, 4)


def test_bfloat16_keeps_parameters_and_outputs_in_float32():
    model = VAE(ModelConfig(latent_dim=4, dtype="bfloat16"), 32, Execution("plain"))
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    variables = model.init(jax.random.key(1), images, NOISE, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    output = model.apply(variables, images, NOISE, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    exact = VAE(ModelConfig(latent_dim=4), 32, Execution("plain")).apply(variables, images, NOISE, train=False)
    np.testing.assert_allclose(output.reconstruction, exact.reconstruction, atol=0.05)
    assert not np.array_equal(output.reconstruction, exact.reconstruction)  # it did compute in bfloat16


def test_dropout_acts_in_training_only():
    model = VAE(ModelConfig(latent_dim=4, dropout_rate=0.5, normalization="none"), 32, Execution("plain"))
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    variables = model.init(jax.random.key(1), images, NOISE, train=False)

    def encode(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, NOISE, train=train, rngs=rngs).posterior.mean

    assert not np.allclose(encode(True, 0), encode(True, 1))
    np.testing.assert_array_equal(encode(False, 0), encode(False, 1))


def test_posterior_samples_have_its_moments():
    posterior = Posterior(jnp.full((50_000, 2), 3.0), jnp.full((50_000, 2), jnp.log(4.0)))
    sample = posterior.sample(jax.random.normal(jax.random.key(0), posterior.mean.shape))
    np.testing.assert_allclose(sample.mean(axis=0), 3.0, atol=0.05)
    np.testing.assert_allclose(sample.std(axis=0), 2.0, rtol=0.02)


def test_log_variance_is_bounded():
    model = VAE(ModelConfig(latent_dim=4), 32, Execution("plain"))
    images = jnp.ones((2, 32, 32, 3))
    variables = model.init(jax.random.key(1), images, NOISE, train=False)
    head = variables["params"]["encoder"]["log_variance"]
    head["kernel"], head["bias"] = 1e6 * head["kernel"], 1e6 * jnp.array([1.0, -1.0, 1.0, -1.0])
    output = model.apply(variables, images, NOISE, train=False)
    log_variance = output.posterior.log_variance
    assert (float(log_variance.min()), float(log_variance.max())) == LOG_VARIANCE_RANGE
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


def test_every_pixel_value_survives_the_way_there_and_back():
    values = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_pixels(to_unit(values)), values)
