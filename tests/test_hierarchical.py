"""The hierarchical VAE against a second implementation of the published network, and its code."""

import dataclasses
import functools
import importlib
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import facevae_jax
from facevae_jax.config import DataConfig, RunConfig
from facevae_jax.exporting.published import vdvae_parameters
from facevae_jax.inference import Inference
from facevae_jax.models import hierarchical
from facevae_jax.models.api import Execution, image_keys
from facevae_jax.models.likelihoods import ColorLogisticLikelihood, GaussianLikelihood, LogisticMixture
from facevae_jax.objective import gaussian_kl, image_terms
from facevae_jax.training.setup import make_model
from tests.conftest import assert_one_line_error, run_module

SIDE = 32
SMALL = hierarchical.Config(
    encoder_blocks="32x1,32d2,16d2,8x1,8d2,4d4,1x1",
    decoder_blocks="1x2,4m1,4x1,8m4,16m8,32m16",
    width=8,
    widths="8:12,4:12,1:16",
    bottleneck_widths="16:5",
    latent_channels=3,
    bias_up_to=8,
    pixel_mean=112.9,
    pixel_deviation=69.8,
    code_resolution=SIDE,
)


def parse(text):
    """(resolution, letter, number) of each block."""
    found = []
    for part in text.split(","):
        letter = next((letter for letter in "xdm" if letter in part), None)
        first, *rest = part.split(letter) if letter else (part,)
        found += [(int(first), None, 0)] * int(rest[0]) if letter == "x" else [(int(first), letter, int(*rest or "0"))]
    return found


class Published:
    """The network of Child 2021, block by block, channels first, over tensors by their published names."""

    def __init__(self, config, seed=0):
        self.config, self.random, self.tensors = config, np.random.default_rng(seed), {}

    def conv(self, name, x, features, size=1):
        if f"{name}.weight" not in self.tensors:
            inputs = x.shape[1]
            scale = 0.7 / math.sqrt(inputs * size * size)
            self.tensors[f"{name}.weight"] = self.random.normal(0, scale, (features, inputs, size, size))
            self.tensors[f"{name}.bias"] = self.random.normal(0, 0.1, features)
        kernel, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        edge = size // 2
        padded = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
        height, width = x.shape[2:]
        windows = [padded[:, :, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        columns = np.stack(windows, axis=2).reshape(len(x), -1, height * width)
        return (kernel.reshape(features, -1) @ columns).reshape(len(x), features, height, width) + bias[:, None, None]

    def block(self, name, x, resolution, features):
        size, inside = (3 if resolution > 2 else 1), {8: 3, 4: 3, 1: 4, 16: 5}.get(resolution, 2)
        active = {"gelu": scipy.stats.norm.cdf, "silu": scipy.special.expit}[self.config.activation]
        for number, (width, side) in enumerate(((inside, 1), (inside, size), (inside, size), (features, 1)), start=1):
            x = self.conv(f"{name}.c{number}", x * active(x), width, side)
        return x

    def log_deviation(self, raw):
        if self.config.deviation == "exp":
            return raw
        return np.log(np.logaddexp(0.0, math.log(2.0) * raw) / math.log(2.0))  # Hazami et al. 2022, with beta = ln 2

    def bias_of(self, name, shape):
        return self.tensors.setdefault(name, self.random.normal(0, 0.3, shape))

    def encode(self, images):
        x = (images.transpose(0, 3, 1, 2).astype(np.float64) - self.config.pixel_mean) / self.config.pixel_deviation
        x = self.conv("encoder.in_conv", x, self.config.width_of(images.shape[1]), 3)
        seen = {x.shape[2]: x}
        for number, (resolution, letter, factor) in enumerate(parse(self.config.encoder_blocks)):
            x = x + self.block(f"encoder.enc_blocks.{number}", x, resolution, x.shape[1])
            if letter == "d":
                x = x.reshape(*x.shape[:2], x.shape[2] // factor, factor, -1, factor).mean(axis=(3, 5))
                more = self.config.width_of(x.shape[2]) - x.shape[1]
                x = np.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
            seen[x.shape[2]] = x
        return seen

    def decode(self, seen, noise):
        config, states, groups = self.config, {}, []
        blocks, batch, z = parse(config.decoder_blocks), len(noise[0]), config.latent_channels
        for number, resolution in enumerate(sorted({resolution for resolution, _, _ in blocks})):
            shape = (1, config.width_of(resolution), resolution, resolution)
            bias = self.bias_of(f"decoder.bias_xs.{number}", shape) if resolution <= config.bias_up_to else 0.0
            states[resolution] = np.zeros((batch, *shape[1:])) + bias
        for number, (resolution, letter, above) in enumerate(blocks):
            name, x = f"decoder.dec_blocks.{number}", states[resolution]
            if letter == "m":
                x = x + np.kron(states[above][:, : x.shape[1]], np.ones((resolution // above, resolution // above)))
            width = x.shape[1]
            both = np.concatenate([x, seen[resolution]], axis=1)
            mean, deviation = np.split(self.block(f"{name}.enc", both, resolution, 2 * z), 2, axis=1)
            of_prior = self.block(f"{name}.prior", x, resolution, 2 * z + width)
            deviation, prior_deviation = (self.log_deviation(of) for of in (deviation, of_prior[:, z : 2 * z]))
            value = mean + np.exp(deviation) * noise[number]
            groups.append((value, mean, deviation, of_prior[:, :z], prior_deviation))
            x = x + of_prior[:, 2 * z :] + self.conv(f"{name}.z_proj", value, width)
            states[resolution] = x + self.block(f"{name}.resnet", x, resolution, width)
        x = states[blocks[-1][0]]
        gain, bias = (self.bias_of(f"decoder.{name}", (1, x.shape[1], 1, 1)) for name in ("gain", "bias"))
        return self.conv("decoder.out_net.out_conv", x * gain + bias, 100).transpose(0, 2, 3, 1), groups


class Probe(hierarchical.HierarchicalVAE):
    def with_noise(self, images, noise):
        return self.decoder(self.encoder(images), noise)


@pytest.fixture(scope="module")
def likelihood():
    return ColorLogisticLikelihood(SIDE * SIDE * 3, components=10)


def run_published(config):
    """Images, noise, the published network's raw output and groups, and its parameters."""
    random, network = np.random.default_rng(1), Published(config)
    images = random.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    noise = [random.normal(size=(2, shape[2], shape[0], shape[1])) for shape in SMALL.groups]
    raw, groups = network.decode(network.encode(images), noise)
    tensors = {name: tensor.astype(np.float32) for name, tensor in network.tensors.items()}
    return jnp.asarray(images), noise, raw, groups, tensors


@pytest.fixture(scope="module")
def published(likelihood):
    return run_published(SMALL)


def parameters_of(tensors):
    return jax.tree.map(jnp.asarray, {"params": vdvae_parameters(tensors, SMALL)})


@pytest.mark.parametrize("of_hazami", [False, True])
@pytest.mark.parametrize("form", ["plain", "matmul"])
def test_the_network_is_the_published_one(published, likelihood, form, of_hazami):
    config = dataclasses.replace(SMALL, **({"activation": "silu", "deviation": "softplus"} if of_hazami else {}))
    images, noise, raw, groups, tensors = run_published(config) if of_hazami else published
    model = Probe(config, SIDE, likelihood, Execution(form))
    variables = parameters_of(tensors)
    of_init = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, image_keys(jax.random.key(0), 2), train=False)
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, of_init)
    given = [jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32) for x in noise]
    found, drawn = jax.jit(lambda: model.apply(variables, images, given, method="with_noise"))()
    np.testing.assert_allclose(found, raw, atol=1e-5 * np.abs(raw).max())
    for group, (value, mean, deviation, prior_mean, prior_deviation) in zip(drawn, groups, strict=True):
        np.testing.assert_allclose(group.value, value.transpose(0, 2, 3, 1), atol=1e-5)
        variance, prior_variance = np.exp(2 * deviation), np.exp(2 * prior_deviation)
        kl = 0.5 * ((variance + (mean - prior_mean) ** 2) / prior_variance - 1) + prior_deviation - deviation
        np.testing.assert_allclose(gaussian_kl(group.posterior, group.prior), kl.transpose(0, 2, 3, 1), atol=1e-5)


def test_gradients_of_a_few_images_at_a_time_are_those_of_all(published, likelihood):
    """On a CPU each block is computed for one image after the other, and again for its gradient."""
    images, noise, *_, tensors = published
    given = [jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32) for x in noise]

    def gradients(execution):
        def loss(variables):
            raw, groups = Probe(SMALL, SIDE, likelihood, execution).apply(variables, images, given, method="with_noise")
            return jnp.sum(jnp.sin(raw)) + sum(jnp.sum(gaussian_kl(group.posterior, group.prior)) for group in groups)

        return jax.jit(jax.grad(loss))(parameters_of(tensors))

    whole, cut = gradients(Execution("plain")), gradients(Execution("matmul", block_bytes=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max()), whole, cut)


def test_a_missing_and_a_strange_tensor_are_refused(published):
    tensors = published[-1]
    with pytest.raises(KeyError, match="out_conv"):
        vdvae_parameters({k: v for k, v in tensors.items() if k != "decoder.out_net.out_conv.bias"}, SMALL)
    with pytest.raises(ValueError, match="extra"):
        vdvae_parameters(tensors | {"extra": np.zeros(1)}, SMALL)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vdvae_ffhq256", 114_874_852), ("vdvae_imagenet64", 125_005_860), ("vdvae_cifar10", 39_145_700)],
)
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    config = RunConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    model, _ = make_model(config)
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros((1, *model.image_shape)), image_keys(jax.random.key(0), 1), train=False
        )
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def compiled(likelihood, variables, **settings):
    """The model's `apply` with these settings, jitted; and the shape of its code."""
    config = dataclasses.replace(SMALL, **settings)
    model = hierarchical.build(config, resolution=SIDE, likelihood=likelihood, execution=Execution())
    apply = jax.jit(functools.partial(model.apply, variables), static_argnames=("method", "train"))
    return apply, model.code_shape


@pytest.fixture(scope="module")
def variables(published):
    return parameters_of(published[-1])


def test_a_codes_rate_is_that_of_its_groups(variables, published, likelihood):
    """The code is measured by its prior, so its rate under N(0, I) is the sum of all groups'."""
    images, (apply, _) = published[0], compiled(likelihood, variables)
    code = apply(images, method="encode")
    output = apply(images, None, train=False)
    rates = sum(jnp.sum(kl.reshape(2, -1), axis=1) for kl in image_terms(images / 255, output, likelihood).kl)
    np.testing.assert_allclose(jnp.sum(gaussian_kl(code), axis=1), rates, rtol=1e-4)
    decoded = apply(code.mean, method="decode")
    np.testing.assert_allclose(decoded.mean, output.decoded.mean, atol=1e-4)


def test_a_code_and_its_details_are_all_groups(published, likelihood, variables):
    """Wherever the code ends: measured by their priors, all groups of an image give its reconstruction."""
    images, (apply, shape) = published[0], compiled(likelihood, variables, code_resolution=4)
    assert shape == (2 * 3 + 2 * 16 * 3,)
    code, details = apply(images, method="encode").mean, apply(images, method="details")
    whole = compiled(likelihood, variables)[0](images, method="encode").mean
    np.testing.assert_allclose(jnp.concatenate([code, details], axis=1), whole, atol=1e-5)
    expected, cut = apply(images, None, train=False).decoded.mean, apply(code, method="decode").mean
    np.testing.assert_allclose(apply(code, details, method="decode").mean, expected, atol=1e-4)
    np.testing.assert_allclose(apply(code, 0.0 * details, method="decode").mean, cut, atol=1e-6)
    assert np.abs(cut - expected).max() > 1e-3


OF_PATCHES = {"patch": 4, "encoder_blocks": "8x1,8d2,4d4,1x1", "decoder_blocks": "1x1,4m1,8m4", "width": 16}


@pytest.mark.parametrize("width", [8, 12])
def test_a_network_on_patches_of_4x4_makes_images(width):
    config = hierarchical.Config(**OF_PATCHES, widths=f"8:{width}")
    RunConfig(data=DataConfig(resolution=SIDE), model=config)
    model = hierarchical.HierarchicalVAE(config, SIDE, GaussianLikelihood(SIDE * SIDE * 3))
    images = jnp.zeros((2, SIDE, SIDE, 3), jnp.uint8)
    output = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, None, train=False)[0])
    assert output.decoded.mean.shape == images.shape


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"decoder_blocks": "1x1,4m1,8m4,16m8,32y2"}, "model.decoder_blocks"),
        ({"decoder_blocks": "1x1,8m4,32m8"}, "model.decoder_blocks"),  # 4x4 is not there
        ({"decoder_blocks": "1x1,4m1"}, "model.decoder_blocks"),  # ends before the pixels
        ({"decoder_blocks": "1x1,2m1,32m2"}, "model.decoder_blocks"),  # no activations of 2x2
        ({"encoder_blocks": "32d3"}, "model.encoder_blocks"),
        ({"encoder_blocks": "32d2,8x1"}, "model.encoder_blocks"),
        ({"encoder_blocks": ""}, "model.encoder_blocks"),
        ({"widths": "32:12,16:8"}, "model.widths"),
        ({"widths": "32=12"}, "model.widths"),
        ({"widths": "33:96"}, "model.widths"),
        ({"bottleneck_widths": "33:4"}, "model.bottleneck_widths"),
        ({"bottleneck_widths": "32:0"}, "model.bottleneck_widths"),
        ({"decoder_blocks": "1x1,32x2"}, "model.decoder_blocks"),
        ({"decoder_blocks": "32x1,32m32"}, "model.decoder_blocks"),
        ({"widths": "32:2,16:8"}, "model.bottleneck"),
        ({"encoder_blocks": "32x1,32d2,16d2,32x1,8d2,4d4,1x1"}, "model.encoder_blocks"),
        ({"decoder_blocks": "2x1,3m2,32m2"}, "model.decoder_blocks"),
        ({"code_resolution": 0}, "model.code_resolution"),
        ({"code_resolution": 32, "latent_channels": 64}, "model.code_resolution"),
        ({"patch": 2}, "model.decoder_blocks"),
        (OF_PATCHES | {"widths": "8:10"}, "model.widths"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(settings, key):
    with pytest.raises(ValueError, match=f"config.{key}="):
        RunConfig(data=DataConfig(resolution=SIDE), model=hierarchical.Config(**settings))


def test_colors_depend_on_each_other_as_published():
    """Against scipy's distribution function in float64, with each color's mean moved by those before it."""
    random = np.random.default_rng(0)
    means, scales = random.uniform(0.2, 0.8, (2, 3)), random.uniform(0.05, 0.2, (2, 3))
    coefficients, weights = random.uniform(-0.5, 0.5, (2, 3)), np.array([0.4, 0.6])
    parts = (np.log(weights), means.T, np.log(scales).T, coefficients.T)
    mixture = LogisticMixture(*(jnp.asarray(part, jnp.float32)[None, None] for part in parts))
    for pixel in ((0, 255, 7), (255, 0, 128), (90, 31, 200)):
        red, green, _ = (2 * value / 255 - 1 for value in pixel)
        total = 0.0
        for weight, mean, scale, (a, b, c) in zip(weights, means, scales, coefficients, strict=True):
            product = weight
            for value, at, width in zip(
                pixel, mean + np.array([0, a * red, b * red + c * green]) / 2, scale, strict=True
            ):
                logistic = scipy.stats.logistic(at, width)
                below = 0.0 if value == 0 else logistic.cdf((value - 0.5) / 255)
                product *= (1.0 if value == 255 else logistic.cdf((value + 0.5) / 255)) - below
            total += product
        found = mixture.log_probability(jnp.asarray(pixel, jnp.float32)[None, None] / 255)
        assert float(found) == pytest.approx(math.log(total), rel=1e-3)


@pytest.mark.slow
def test_published_weights_become_a_model(published, tmp_path):
    """By the command, from a PyTorch file; the file of another network and one that holds more are refused."""
    torch = pytest.importorskip("torch")
    images, tensors = np.asarray(published[0]), published[-1]
    torch.save({f"module.{name}": torch.tensor(tensor) for name, tensor in tensors.items()}, tmp_path / "x.th")
    settings = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)} | {"code_resolution": 4}
    config = ["--config=vdvae_cifar10", *(f"--config.model.{name}={value}" for name, value in settings.items())]
    words = ["facevae_jax.convert", "--from=vdvae", f"--checkpoint={tmp_path / 'x.th'}", f"--output={tmp_path / 'out'}"]
    assert_one_line_error(run_module(*words), "fits no network")
    result = run_module(*words, *config)
    assert result.returncode == 0, result.stderr
    model = facevae_jax.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, model.variables["params"], parameters_of(tensors)["params"])
    assert model.reconstruct(images).shape == images.shape
    np.testing.assert_array_equal(model.sample(3, prior="standard")[:2], model.sample(2, prior="standard"))
    torch.save({"x": pathlib.Path("x")}, tmp_path / "x.th")
    assert_one_line_error(run_module(*words, *config), "already")
    shutil.rmtree(tmp_path / "out")
    assert_one_line_error(run_module(*words, *config), "x.th", "tensors alone")
    assert_one_line_error(run_module(*words[:2], "--checkpoint=/nowhere.th", words[3]), "/nowhere.th")


@pytest.mark.parametrize(("name", "images"), [("vdvae_ffhq256", 1), ("evdvae_celeba64_compact", 81), ("ffhq256", 16)])
def test_as_many_images_are_computed_at_a_time_as_their_activations_allow(name, images):
    """Of the published network at 256x256 one takes 134 MB; of a plain VAE there, none takes more than 8 MB."""
    model, _ = make_model(RunConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config()))
    assert Inference(model, {}).batch_size == images
