"""The examples of docs/extending.md run as they stand, through the trainer and the tools."""

import dataclasses
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import facevae_jax
from facevae_jax import models
from facevae_jax.config import DataConfig
from facevae_jax.data.dataset import open_dataset
from facevae_jax.generation import verbs
from facevae_jax.latents import priors
from facevae_jax.models import likelihoods
from facevae_jax.prepare import LAYOUTS
from tests.conftest import REPOSITORY, change

EXAMPLES = dict(
    re.findall(
        r"^## (.+?)$.*?^```python\n(.*?)^```",
        (REPOSITORY / "docs" / "extending.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


def example(heading: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The code under a heading, as a module that can be imported."""
    module = types.ModuleType(f"example_{len(heading)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(EXAMPLES[heading], heading, "exec"), module.__dict__)
    return module


@pytest.mark.slow
def test_the_notebook(monkeypatch):
    found = example("How a training step is read", monkeypatch)
    assert int(found.state.step) == 1
    assert np.isfinite(found.metrics.loss.loss)


@pytest.mark.slow
def test_a_model(tiny_config, tmp_path, monkeypatch):
    found = example("A model", monkeypatch)
    monkeypatch.setitem(models.KINDS, "linear", found.__name__)
    config = change(tiny_config, train={"steps": 10})
    config = dataclasses.replace(config, model=found.Config(latent_dim=4))
    model = facevae_jax.train(config, tmp_path)
    assert facevae_jax.load(tmp_path).config.model == config.model
    assert model.encode(model.sample(3)).mean.shape == (3, 4)
    scores = facevae_jax.evaluate(model, draws=(1, 4))
    bounds = scores["importance"]["bounds"]
    assert bounds["4"] < bounds["1"] == pytest.approx(scores["likelihood"]["negative_elbo"], rel=0.05)
    line = verbs.traverse(model, verbs.Request(output=str(tmp_path / "sheet.png"), count=2))
    assert "dimensions" in line


def test_a_prior(finished, monkeypatch):
    found = example("A prior", monkeypatch)
    monkeypatch.setitem(priors.PRIORS, "kernel", f"{found.__name__}:KernelPrior")
    model = facevae_jax.load(finished[0])
    assert model.sample(3, prior="kernel").shape == (3, 32, 32, 3)
    prior = model.prior("kernel")
    codes = np.random.default_rng(0).normal(size=(5, model.code_size)).astype(np.float32)
    variance = float(prior.width) ** 2
    density = np.mean([stats.multivariate_normal(center, variance).pdf(codes) for center in prior.codes], axis=0)
    np.testing.assert_allclose(prior.log_density(codes), np.log(density), rtol=1e-3)


@pytest.mark.slow
def test_a_likelihood(tiny_config, tmp_path, monkeypatch):
    found = example("A likelihood", monkeypatch)
    cls = found.LaplaceLikelihood
    monkeypatch.setitem(likelihoods.LIKELIHOODS, "laplace", cls)
    config = change(tiny_config, objective={"likelihood": "laplace"}, train={"steps": 5})
    model = facevae_jax.train(config, tmp_path)
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    decoded = model.module.apply(model.variables, jax.numpy.zeros((2, 8)), method="decode")
    expected = stats.laplace(np.asarray(decoded.mean), 0.1).logpdf(images).sum(axis=(1, 2, 3))
    found = model.likelihood.log_prob(images, decoded, jax.numpy.ones(2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_layout(tmp_path, monkeypatch):
    found = example("A layout", monkeypatch)
    for person in range(20):
        folder = tmp_path / "people" / f"person{person:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), (person, 0, 0)).save(folder / "face.jpg")
    monkeypatch.setitem(LAYOUTS, "people", lambda source, options: found.people_layout(pathlib.Path(source)))
    data = tmp_path / "data"
    folder = facevae_jax.prepare(tmp_path / "people", layout="people", resolution=32, data_dir=data)
    assert folder == data / "people" / "32" / "1.0.0"
    dataset = open_dataset(DataConfig(name="people", data_dir=str(data), resolution=32))
    assert dataset.sizes == {"train": 18, "validation": 2}
    assert dataset.labels("validation").column("person").tolist() == [9.0, 19.0]
