"""What the tests of norms of each example share: which cases are run.

There are 300 random programs, and three ways to measure each model. The gate runs a few
programs, among which are layers of every kind, and most models in one way.
"""

import os

import pytest

from ..shares import leave_out
from .agreement import WAYS, forget
from .models import ALIKE, MODELS
from .programs import IN_THE_GATE


@pytest.fixture(autouse=True, scope="module")
def _what_was_compiled_is_forgotten():
    """Leaves a process as it was: XLA ends it where it holds a thousand programs."""
    yield
    forget()


def is_in_the_gate(case):
    """Says whether a case, {argument: value} of a test, is one that the gate runs."""
    if set(case) == {"seed"}:
        return case["seed"] in IN_THE_GATE
    if set(case) == {"case", "rule"}:
        return case["rule"] == WAYS[len(case["case"]) % len(WAYS)]
    if set(case) == {"name", "way"}:
        number = list(MODELS).index(case["name"])
        return case["name"] not in ALIKE and case["way"] == WAYS[number % len(WAYS)]
    return True


def pytest_collection_modifyitems(config, items):
    """Leaves cases out, unless all are asked for."""
    here = os.path.dirname(__file__)

    def is_chosen(item):
        ours = str(item.path).startswith(here) and hasattr(item, "callspec")
        return not ours or is_in_the_gate(item.callspec.params)

    leave_out(config, items, is_chosen)
