"""The resolved settings and the parameters of every config, so that a change of either shows in review."""

import json

import jax
import pytest

from facevae_jax.config import RunConfig
from facevae_jax.training.setup import TrainSetup, abstract_state, make_mesh
from tests.conftest import REPOSITORY
from tests.test_config import CONFIGS, load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_and_parameters_are_those_on_record(path, request):
    config = RunConfig.from_config_dict(load(path))
    state = abstract_state(TrainSetup.of(config, make_mesh()))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    shapes = {
        jax.tree_util.keystr(names, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for names, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    found = json.dumps({"config": config.to_dict(), "variables": shapes}, indent=2) + "\n"
    golden = REPOSITORY / "tests" / "golden" / f"{path.stem}.json"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text(), "if it is meant: pytest tests/test_golden.py --update-golden"
