"""Norms of each example are right for programs that nobody wrote."""

import numpy as np
import pytest

from .agreement import WAYS, assert_alone, assert_right, forget, measured
from .oracle import in_float64
from .programs import IN_THE_GATE, KINDS, SEEDS, program


@pytest.mark.parametrize("seed", range(SEEDS))
def test_values_and_norms_of_a_random_program_are_right(seed):
    model, way = program(seed).model, WAYS[seed % len(WAYS)]
    assert np.all(np.isfinite(in_float64(model).values))
    assert np.all(in_float64(model).whole > 1e-3)
    assert_right(model, measured(model, way))
    assert_alone(model, way)
    forget()


def test_the_share_that_the_gate_runs_has_layers_of_every_kind():
    kinds = {kind for seed in IN_THE_GATE for kind in program(seed).kinds}
    assert kinds == set(KINDS)
    assert {seed % len(WAYS) for seed in IN_THE_GATE} == set(range(len(WAYS)))
