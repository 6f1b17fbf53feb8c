"""Commands in odd shells; `tests.environments` has them."""

import signal

import pytest

from tests.environments import cases, failure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("environments")


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_a_command_ends_well_wherever_it_is_started(folder, case):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, and so would the command
    assert failure(case, folder) == ""


def test_there_are_cases_enough():
    assert len({case.name for case in cases()}) == len(cases()) >= 60
