"""The resolved settings and the parameters of every config, so that a change of either shows in review."""

import importlib
import json

import jax
import pytest

from facevae_jax.config import RunConfig
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"
NAMES = {path.stem for path in (*GOLDEN.glob("*.json"), *(REPOSITORY / "configs").glob("[!_]*.py"))}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_settings_and_parameters_are_those_on_record(name, request):
    given = importlib.import_module(f"configs.{name}").get_config()
    with pytest.raises(AttributeError):
        given.model.latent_dims = 3
    config = RunConfig.from_config_dict(given)
    assert RunConfig.from_config_dict(json.loads(json.dumps(config.to_dict()))) == config
    digits = "".join(filter(str.isdigit, name.removeprefix("vdvae_cifar10")))  # whose 10 are classes
    assert not digits or config.data.resolution == int(digits)
    state = abstract_state(TrainSetup.of(config, make_mesh()))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    shapes = {
        jax.tree_util.keystr(names, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for names, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    found = json.dumps({"config": config.to_dict(), "variables": shapes}, indent=2) + "\n"
    if request.config.getoption("--update-golden"):
        (GOLDEN / f"{name}.json").write_text(found)
    message = "if it is meant: pytest tests/test_golden.py --update-golden"
    assert found == (GOLDEN / f"{name}.json").read_text(), message
