"""Models whose latents are no flat vector, by the same trainer and tools: a spatial autoencoder, and hierarchies.

One hierarchy is written here with nothing but `models.api`, so the trainer and the tools ask no more of a model: a top
group [z] with the prior N(0, I), and below it a spatial group [h, w, c] whose prior the top group predicts.
"""

import base64
import dataclasses
import functools
import io
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import facevae_jax
from facevae_jax import models
from facevae_jax.config import ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.core import pictures, random
from facevae_jax.core.errors import UserError
from facevae_jax.data.batches import row_keys
from facevae_jax.generation import verbs
from facevae_jax.metrics import scores
from facevae_jax.metrics.likelihood import importance_bounds
from facevae_jax.models import autoencoder, hierarchical
from facevae_jax.models.api import Execution, Gaussian, LatentGroup, Output, to_pixels, to_unit
from facevae_jax.models.convolution import depth_to_space, space_to_depth
from facevae_jax.models.likelihoods import Decoded, GaussianLikelihood
from facevae_jax.reporting.write import write_report
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training.evaluation import Evaluator
from facevae_jax.training.loop import train
from facevae_jax.training.setup import TrainSetup, TrainState, make_mesh
from facevae_jax.training.telemetry import read_metrics
from tests.conftest import assert_nearly, assert_same_trees

SIDE, CHANNELS = 4, 2  # of the spatial group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["two_levels"] = "two_levels"
    latent_dim: int = 4

    def check_run(self, run: Any) -> None:
        pass


class TwoLevels(nn.Module):
    config: Config
    resolution: int
    likelihood: GaussianLikelihood

    @property
    def image_shape(self):
        return self.resolution, self.resolution, 3

    @property
    def code_shape(self):
        return (self.config.latent_dim,)

    def setup(self):
        self.patch = self.resolution // SIDE
        self.top = nn.Dense(2 * self.config.latent_dim)
        self.below, self.prior = nn.Dense(2 * CHANNELS), nn.Dense(2 * SIDE**2 * CHANNELS)
        self.pixels = nn.Dense(self.patch**2 * self.likelihood.channels(3))

    def __call__(self, images, keys, *, train):
        top, posterior = self.encode(images), Gaussian.bounded(*jnp.split(self.below(self.patches(images)), 2, axis=-1))
        streams = [None if keys is None else random.substream(keys, number) for number in range(2)]
        code, below = (q.sample(stream) for q, stream in zip((top, posterior), streams, strict=True))
        groups = LatentGroup(code, top), LatentGroup(below, posterior, self.prior_of(code))
        return Output(self.decoded(code, below), groups)

    def patches(self, images):
        return space_to_depth(to_unit(images) - 0.5, self.patch)

    def prior_of(self, code):
        return Gaussian.bounded(*jnp.split(self.prior(code).reshape(-1, SIDE, SIDE, 2 * CHANNELS), 2, axis=-1))

    def decoded(self, code, below):
        grid = jnp.broadcast_to(code[:, None, None], (len(code), SIDE, SIDE, code.shape[1]))
        return self.likelihood.decode(depth_to_space(self.pixels(jnp.concatenate([grid, below], -1)), self.patch))

    def encode(self, images):
        flat = self.patches(images).reshape(images.shape[0], -1)
        return Gaussian.bounded(*jnp.split(self.top(flat), 2, axis=-1))

    @property
    def detail_shapes(self):
        return ((SIDE, SIDE, CHANNELS),)

    @property
    def activation_size(self):
        return 0

    def details(self, images):
        prior, mean = (
            self.prior_of(self.encode(images).mean),
            jnp.split(self.below(self.patches(images)), 2, axis=-1)[0],
        )
        return ((mean - prior.mean) * jnp.exp(-0.5 * prior.log_variance)).reshape(len(images), -1)

    def decode(self, code, details=None) -> Decoded:
        prior = self.prior_of(code)
        drawn = 0.0 if details is None else details.reshape(prior.mean.shape)
        return self.decoded(code, prior.mean + jnp.exp(0.5 * prior.log_variance) * drawn)


def build(config: Config, *, resolution: int, likelihood: GaussianLikelihood, execution: Execution) -> TwoLevels:
    return TwoLevels(config, resolution, likelihood)


class Run(NamedTuple):
    config: RunConfig
    state: TrainState
    trained: TrainedModel

    def apply(self, *arguments, **keywords):
        return self.trained.module.apply(self.trained.variables, *arguments, **keywords)


# Their programs take long to compile.
SPATIAL, DEEP = (pytest.param(name, marks=pytest.mark.slow) for name in ("spatial", "deep"))
MODELS = {
    "spatial": autoencoder.Config(latent_channels=2, width=8),
    "levels": Config(),
    "deep": hierarchical.Config(
        encoder_blocks="16x1,16d4,4d4,1x1",
        decoder_blocks="1x2,4m1,16m4,16x1",
        width=8,
        latent_channels=2,
        patch=2,
        activation="silu",
        deviation="softplus",
    ),
}


@pytest.fixture(scope="module")
def run_of(tiny_config, finished, tmp_path_factory):
    """A function from a kind to its trained model: each is trained once."""

    @functools.cache
    def trained(kind: str) -> Run:
        if kind == "vae":
            return Run(tiny_config, finished[1], facevae_jax.load(finished[0]))
        rate = {} if kind == "spatial" else {"kl_weight": 0.5, "free_bits": 0.01}
        objective = ObjectiveConfig(likelihood="gaussian", **rate)
        settings = {"batch_size": 16, "steps": 20, "warmup_steps": 0, "log_every_steps": 1, "steps_per_dispatch": 4}
        config = RunConfig(
            data=tiny_config.data, model=MODELS[kind], objective=objective, train=TrainConfig(**settings)
        )
        workdir = tmp_path_factory.mktemp(kind)
        return Run(config, train(config, workdir), facevae_jax.load(workdir))

    return trained


@pytest.fixture(scope="module", params=["vae", SPATIAL, "levels", DEEP])
def run(request, run_of):
    """A trained model of each kind; that of the hierarchy is registered as long as its tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.KINDS, "two_levels", __name__)
        yield run_of(request.param)


only_levels = pytest.mark.parametrize("run", ["levels"], indirect=True)


@pytest.mark.parametrize("run", [SPATIAL, "levels", DEEP], indirect=True)
def test_stopping_and_resuming_changes_no_bit(run, tmp_path):
    train(run.config, tmp_path, should_stop=lambda step: step >= 7)
    assert_same_trees(train(run.config, tmp_path), run.state)


def test_evaluation_is_exact_for_a_ragged_split(run):
    """37 images in batches of 16 score the same as all at once, by the closed forms in float64."""
    images, config = run.trained.dataset.images("validation"), run.config
    setup = TrainSetup.of(config, make_mesh())
    loss, units, sides, active = Evaluator(setup, images)(run.state)
    (keys,) = row_keys(jnp.arange(37), "evaluate", seed=0, step=0)
    output = run.apply(jnp.asarray(images), keys, train=False)
    expected, varying = [], []
    for _, posterior, prior in output.latents:
        m, v = (np.asarray(x, np.float64).reshape(37, -1) for x in posterior)
        n, w = (np.asarray(x, np.float64).reshape(37, -1) for x in prior or (np.zeros_like(m), np.zeros_like(m)))
        expected.append(0.5 * ((np.exp(v) + (m - n) ** 2) / np.exp(w) - 1 + w - v))
        varying.append(np.sum(((m - n) / np.exp(w / 2)).var(axis=0) > 0.01))
    assert list(sides) == [m.shape[1] if m.ndim > 2 else 1 for m in (group.posterior.mean for group in output.latents)]
    assert (list(units), list(active)) == ([kl.shape[1] for kl in expected], varying)
    np.testing.assert_allclose(loss.rates, [kl.sum(axis=1).mean() for kl in expected], rtol=1e-4)
    floored = sum(np.maximum(kl.mean(axis=0), config.objective.free_bits).sum() for kl in expected)
    np.testing.assert_allclose(loss.kl_term, config.objective.kl_weight * floored, rtol=1e-4)
    error = np.square(np.asarray(output.decoded.mean, np.float64) - images / 255).mean()
    np.testing.assert_allclose(loss.mse, error, rtol=1e-5)
    nll = 0.5 * 3072 * (np.log(2 * np.pi * loss.variance) + error / loss.variance)
    np.testing.assert_allclose(loss.nll, nll, rtol=1e-5)


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_large_neither_ends_in_nan_nor_stands_still(tiny_config, tmp_path):
    """Thirty times the rate: large updates are skipped, and the run still learns from most batches."""
    settings = {"batch_size": 16, "steps": 80, "warmup_steps": 0, "log_every_steps": 20, "skip_factor": 4.0}
    rate = TrainConfig(optimizer="adamax", learning_rate=30 * 2e-3, **settings)
    objective = ObjectiveConfig(likelihood="color_logistic", mixture_components=2)
    config = RunConfig(data=tiny_config.data, model=MODELS["deep"], objective=objective, train=rate)
    state = train(config, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    records = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert all(record.get("too_large", 0) < 15 for record in records)  # of 20 steps
    assert records[-1]["loss"] < records[0]["loss"]


@only_levels
def test_the_trainer_logs_the_rate_of_each_group(run):
    records = read_metrics(run.trained.folder)
    assert len(records) == 20 + 2
    for record in records:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl_term"], rel=1e-6)
        assert len(record["rates"]) == 2
        assert record["kl"] == pytest.approx(sum(record["rates"]), rel=1e-5)
        assert record["negative_elbo"] == pytest.approx(record["nll"] + record["kl"], rel=1e-6)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("run", ["levels", DEEP], indirect=True)
def test_bounds_grow_with_the_number_of_draws_of_all_groups(run):
    trained = run.trained
    of_model = {"likelihood": trained.likelihood, "variance": trained.variance}
    bounds = importance_bounds(trained.inference, trained.dataset.images("validation"), **of_model, draws=(1, 4, 16))
    means = [bounds[count].mean() for count in (1, 4, 16)]
    assert means[0] < means[1] < means[2]
    record = scores.evaluate(trained, draws=())["likelihood"]
    assert len(record["rates"]) > 1
    # Of other draws, which move it by some nats; that of the deep one is near 0.
    nats = None if len(record["rates"]) == 2 else 10.0
    assert -means[0] == pytest.approx(record["negative_elbo"], rel=0.02, abs=nats)


with_details = pytest.mark.parametrize("run", ["levels", DEEP], indirect=True)


@with_details
def test_details_are_drawn_from_their_priors_by_seed_and_number(run):
    """Draws of N(0, I) times a temperature, which depend on no batch; a temperature for each resolution."""
    trained = run.trained
    side = trained.inference.detail_shapes[0][0]
    codes, drawn = trained.sample_codes(40, prior="standard", seed=3), trained.sample_details(40, seed=3)
    assert drawn.shape == (40, trained.detail_size)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 5 / np.sqrt(trained.detail_size)
    np.testing.assert_allclose(trained.sample_details(10, seed=3, temperature=0.5, first=30), 0.5 * drawn[30:])
    faces = trained.sample(40, prior="standard", seed=3)
    assert_nearly(faces, trained.decode(codes, drawn))
    in_batches = facevae_jax.load(trained.folder, batch_size=8).sample_stream(40, prior="standard", seed=3)
    assert_nearly(faces, np.concatenate(list(in_batches)))
    assert_nearly(trained.sample(40, prior="standard", seed=3, temperature={1: 1.0, side: 0.0}), trained.decode(codes))
    assert np.abs(faces - trained.decode(codes).astype(int)).max() > 3
    others = np.concatenate(list(trained.sample_stream(40, prior="standard", seed=3, detail_seed=4)))
    assert_nearly(others, trained.decode(codes, trained.sample_details(40, seed=4)))
    with pytest.raises(UserError, match="no groups at 5"):
        trained.sample(1, prior="standard", temperature={1: 1.0, 5: 0.0})


@with_details
def test_a_face_keeps_its_details_draws_them_or_has_their_mean(run, tmp_path):
    trained = run.trained
    rows = [0, 3, 4]
    images = trained.dataset.images("validation")[rows]
    code, details = trained.encode(images).mean, trained.details(images)
    assert_nearly(trained.decode(code, details), trained.reconstruct(images))

    def made(verb, detail, **settings):
        to = tmp_path / f"{verb.__name__}-{detail}.npz"
        verb(trained, verbs.Request(output=str(to), split="validation", rows=rows, detail=detail, **settings))
        return np.load(to)["arr_0"]

    drawn = trained.sample_details(3, seed=5, temperature=0.7)
    of = {"keep": trained.reconstruct(images), "mean": trained.decode(code), "prior": trained.decode(code, drawn)}
    for detail, expected in of.items():
        assert_nearly(made(verbs.reconstruct, detail, seed=5, temperature=0.7), expected)
        path = made(verbs.interpolate, detail, seed=5, temperature=0.7, steps=2)
        assert_nearly(path[[0, 2, 4]], expected)
    halfway = trained.decode((code[:1] + code[1:2]) / 2, (details[:1] + details[1:2]) / np.sqrt(2))
    assert_nearly(made(verbs.interpolate, "keep", steps=2)[1:2], halfway)
    to = tmp_path / "sampled.npz"
    verbs.sample(trained, verbs.Request(output=str(to), count=3, prior="standard", detail="mean"))
    assert_nearly(np.load(to)["arr_0"], trained.decode(trained.sample_codes(3, prior="standard")))
    moved = made(verbs.traverse, "keep", dimensions=[0, 1], alpha=(0.0, 2.0))
    assert_nearly(moved[[0, 2]], of["keep"][[0, 0]])


@with_details
def test_the_page_shows_what_each_group_decides(run, tmp_path):
    """A face, then its picture with none of its groups, its code, and all: what is not kept is drawn."""
    trained, side = run.trained, run.trained.resolution
    write_report(trained.folder, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    section = html[html.index('<section id="groups"') :]
    data = base64.b64decode(section[section.index("base64,") + 7 :].partition('"')[0])
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    images = trained.dataset.images(trained.dataset.evaluation_split)[:4]
    code, details = trained.encode(images).mean, trained.details(images)
    drawn = trained.sample_details(4, seed=run.config.train.seed)
    expected = [images, None, trained.decode(code, drawn), trained.decode(code, details)]
    step = side + pictures.GAP
    for column, faces in enumerate(expected):
        found = np.stack([sheet[row * step :][:side, column * step :][:, :side] for row in range(4)])
        if faces is not None:
            assert_nearly(found, faces)


@pytest.mark.parametrize(
    ("run", "shape"),
    [
        pytest.param("spatial", (4, 4, 2), marks=pytest.mark.slow),
        ("levels", (4,)),
        pytest.param("deep", (2 * 2 + 16 * 2,), marks=pytest.mark.slow),
    ],
    indirect=["run"],
    ids=["spatial", "levels", "deep"],
)
def test_tools_work_on_codes_of_any_shape_and_may_hold_them_flat(run, shape, tmp_path):
    trained, size = run.trained, int(np.prod(shape))
    images = trained.dataset.images("validation")[:5]
    posterior = trained.encode(images)
    assert posterior.mean.shape == posterior.log_variance.shape == (5, *shape)
    assert trained.posterior_sample(posterior).shape == (5, *shape)
    flat = posterior.mean.reshape(5, -1)
    np.testing.assert_array_equal(trained.decode(posterior.mean), trained.decode(flat))
    if len(shape) == 1:  # a reconstruction has the means of all groups, and a code those of the first
        assert np.abs(trained.decode(flat).astype(int) - trained.reconstruct(images)).max() > 0
        output = run.apply(jnp.asarray(images), None, train=False)
        np.testing.assert_array_equal(to_pixels(output.decoded.mean), trained.reconstruct(images))
    else:
        np.testing.assert_array_equal(trained.decode(flat), trained.reconstruct(images))
    assert trained.code_size == size
    assert trained.moments.covariance.shape == (size, size)
    for prior in ("standard", "gaussian"):
        np.testing.assert_array_equal(trained.sample(2, prior=prior), trained.sample(2, prior=prior))
    verbs.encode(trained, verbs.Request(output=str(tmp_path / "codes.npz"), split="validation"))
    with np.load(tmp_path / "codes.npz") as file:
        assert file["mean"].shape == (37, *shape)
        np.testing.assert_allclose(file["mean"][:5], posterior.mean, atol=1e-5)


@pytest.mark.parametrize("run", [SPATIAL], indirect=True)
@pytest.mark.parametrize("verb", ["sample", "reconstruct", "interpolate", "morph", "edit", "traverse"])
def test_every_verb_draws_a_sheet(run, tmp_path, verb):
    binary = next(attribute.name for attribute in run.trained.dataset.attributes if attribute.kind == "binary")
    given = {
        "sample": {"count": 4, "split": None},
        "morph": {"rows": (0, 1)},
        "edit": {"attribute": (binary,), "rows": (0,)},
        "traverse": {"dimensions": (3, 31), "split": None},
    }
    request = {"output": str(tmp_path / "x.png"), "split": "validation"} | given.get(verb, {})
    getattr(verbs, verb)(run.trained, verbs.Request(**request))
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize("size", [1, 2, 4])
def test_space_to_depth_moves_squares_and_depth_to_space_moves_them_back(size):
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    deep = space_to_depth(x, size)
    assert deep.shape == (2, 8 // size, 12 // size, 3 * size**2)
    np.testing.assert_array_equal(deep[1, 1, 2], x[1, size : 2 * size, 2 * size : 3 * size].ravel())
    np.testing.assert_array_equal(depth_to_space(deep, size), x)
