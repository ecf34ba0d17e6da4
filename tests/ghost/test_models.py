"""Norms of each example agree with `vmap(grad)` in float64, whatever the model is."""

import pytest

from .agreement import WAYS, assert_alone, assert_right, measured
from .models import MODELS

each_model = pytest.mark.parametrize("name", MODELS)
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@each_model
def test_values_and_norms_are_those_of_gradients_of_each_example(name, way):
    model = MODELS[name]()
    assert_right(model, measured(model, way))


@each_way
@each_model
def test_a_nan_in_one_example_changes_no_bit_of_the_others(name, way):
    assert_alone(MODELS[name](), way)
