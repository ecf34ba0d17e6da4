"""What the tests of norms of each example share: which cases are run.

There are 300 random programs, and three ways to measure each model. The gate runs each
thirteenth program, among which are layers of every kind, and most models in one way.
With `GRADNORM_EVERY_PROGRAM=1`, or by name, all are run.
"""

import os

import pytest

from .agreement import WAYS, forget
from .models import ALIKE, MODELS
from .programs import SHARE


@pytest.fixture(autouse=True, scope="module")
def _what_was_compiled_is_forgotten():
    """Leaves a process as it was: XLA ends it where it holds a thousand programs."""
    yield
    forget()


def is_in_the_gate(case):
    """Says whether a case, {argument: value} of a test, is one that the gate runs."""
    if set(case) == {"seed"}:
        return case["seed"] % SHARE == 0
    if set(case) == {"case", "rule"}:
        return case["rule"] == WAYS[len(case["case"]) % len(WAYS)]
    if set(case) == {"name", "way"}:
        number = list(MODELS).index(case["name"])
        return case["name"] not in ALIKE and case["way"] == WAYS[number % len(WAYS)]
    return True


def pytest_collection_modifyitems(config, items):
    """Leaves cases out, unless all are asked for."""
    if os.environ.get("GRADNORM_EVERY_PROGRAM") or any("::" in x for x in config.args):
        return
    here = os.path.dirname(__file__)
    kept, left_out = [], []
    for item in items:
        ours = str(item.path).startswith(here) and hasattr(item, "callspec")
        chosen = not ours or is_in_the_gate(item.callspec.params)
        (kept if chosen else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
