"""Standard layers are understood, each by the rule that costs least."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn
from gradnorm_jax.norms.ghost import convolutions, formulas, recognition
from gradnorm_jax.norms.ghost.sums import Sum
from gradnorm_jax.norms.ghost.terms import Term

from .agreement import taking
from .models import MODELS


def explained(model):
    return gn.explain_norms(model.loss_fn)(model.params, model.batch)


#: Models that are no standard layers: sums of products and of other things.
UNUSUAL = {
    "a_kernel_of_two_convolutions",
    "complex_parameters",
    "heads_by_vmap",
    "only_weight_decay",
    "parametrizations_of_tied_weights",
    "weight_decay",
}


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_of_a_standard_layer_falls_back(name):
    with taking("gram"):  # no leaf is called small, and formed for that
        rows = explained(MODELS[name]())
    assert all(row.is_understood for row in rows) == (name not in UNUSUAL)


def wide(layer, *shapes, length=6):
    """A loss of a layer wide enough that no gradient of it should be formed."""
    key = jax.random.key(0)
    params = [jax.random.normal(key, shape) for shape in shapes]
    batch = jax.random.normal(key, (4, length, 64))
    return lambda params, x: jnp.sum(jnp.tanh(layer(params, x))), params, batch


@pytest.mark.parametrize(
    ("layer", "shapes", "rules"),
    [
        (lambda p, x: x @ p[0], [(64, 80)], ["gram"]),
        (lambda p, x: x[0] @ p[0], [(64, 80)], ["outer"]),
        (lambda p, x: x @ p[0] + p[1], [(64, 80), (80,)], ["gram", "plain"]),
        (lambda p, x: jnp.tanh(x @ p[0]) @ p[0].T, [(64, 80)], ["gram"]),
        (lambda p, x: x @ (2 * p[0] - p[1]), [(64, 80)] * 2, ["gram"] * 2),
        (lambda p, x: p[0][jnp.arange(6) % 4] * x, [(90, 64)], ["gram"]),
        (lambda p, x: jnp.einsum("td,dhk->thk", x, p[0]), [(64, 8, 10)], ["gram"]),
        (lambda p, x: x @ p[0][:, :70], [(64, 90)], ["gram"]),
        (lambda p, x: x @ p[0] @ p[0][:, ::-1], [(64, 64)], ["gram"]),
        (
            lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p[0])[0],
            [(3, 64, 64)],
            ["gram"],
        ),
        (
            lambda p, x: jax.lax.scan(
                lambda h, y: (jnp.tanh(h @ p[0] + y), None), x[0], x
            )[0],
            [(64, 64)],
            ["gram"],
        ),
        (
            lambda p, x: jax.lax.conv_general_dilated(
                x[None], p[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            [(3, 64, 80)],
            ["gram"],
        ),
        (lambda p, x: x @ jnp.cumsum(p[0], 0), [(64, 80)], ["formed in turn"]),
    ],
)
def test_each_layer_has_the_rule_that_costs_least(layer, shapes, rules):
    loss_fn, params, batch = wide(layer, *shapes)
    rows = gn.explain_norms(loss_fn)(params, batch)
    assert [row.rule for row in rows] == rules
    ghost = jax.jit(gn.per_example_norms(loss_fn))(params, batch)
    truth = gn.per_example_norms(loss_fn, implementation="vmap")(params, batch)
    np.testing.assert_allclose(ghost, truth, rtol=5e-6)


def test_long_sequences_of_narrow_layers_are_formed():
    rows = explained(MODELS["many_positions_of_narrow_layers"]())
    assert {row.rule for row in rows} <= {"product", "plain"}


def test_what_is_not_used_is_zero_and_says_so():
    rows = explained(MODELS["scalars_and_what_is_not_used"]())
    unused = next(row for row in rows if row.name == "unused")
    assert (unused.rule, unused.flops, unused.why) == ("zero", 0, "it is not used")


def test_an_explanation_is_a_table_with_a_line_for_each_parameter():
    loss_fn, params, batch = wide(lambda p, x: x @ p[0] + p[1], (64, 80), (80,))
    lines = str(gn.explain_norms(loss_fn)(params, batch)).split("\n")
    assert re.split(r"\s\s+", lines[0]) == [
        "parameter",
        "shape",
        "rule",
        "MFLOP",
        "numbers",
        "why",
    ]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["0", "64x80", "gram"],
        ["1", "80", "plain"],
    ]


def with_one_term_less(terms):
    return lambda *args: terms(*args)[:1]


def without_ids(matrices):
    def mutated(self, arrays):
        return [
            x._replace(ids=None if x.ids is None else jnp.zeros_like(x.ids))
            for x in matrices(self, arrays)
        ]

    return mutated


def used_twice(params, x):
    return jnp.tanh(x @ params[0]) @ params[0].T


def used_with_either_sign(params, x):
    return x @ params[0] + jnp.cos(x) @ -params[0]


def looked_up(params, x):
    return params[0][jnp.arange(6) % 4] * x


def convolved(params, x):
    return jax.lax.conv_general_dilated(
        x[None], params[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


MUTANTS = {
    "a cross term is left out": (
        (used_twice, (64, 80)),
        (recognition, "terms", with_one_term_less(recognition.terms)),
    ),
    "a transpose is left out": (
        (used_twice, (64, 64)),
        (Term, "transposed", lambda self, permutation: self),
    ),
    "a sign is lost": (
        (used_with_either_sign, (64, 80)),
        (Term, "scaled", lambda self, scalar: self),
    ),
    "indices are all the same": (
        (looked_up, (90, 64)),
        (Sum, "matrices", without_ids(Sum.matrices)),
    ),
    "inner products have no sign": (
        (used_twice, (64, 80)),
        (formulas, "_inner_products", lambda x, y: jnp.abs(x @ jnp.swapaxes(y, 1, 2))),
    ),
    "windows are in another order": (
        (convolved, (3, 64, 80)),
        (
            convolutions,
            "_through_windows",
            lambda x, places, *rest, own=convolutions._through_windows: jnp.flip(
                own(x, places, *rest), places[0]
            ),
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_rule_gives_other_norms(mutant, monkeypatch):
    (layer, shape), (owner, attribute, mutated) = MUTANTS[mutant]
    loss_fn, params, batch = wide(layer, shape)
    want = gn.per_example_norms(loss_fn, implementation="vmap")(params, batch)
    got = gn.per_example_norms(loss_fn)(params, batch)
    np.testing.assert_allclose(got, want, rtol=5e-6)
    monkeypatch.setattr(owner, attribute, mutated)
    got = gn.per_example_norms(loss_fn)(params, batch)
    assert np.max(np.abs(np.asarray(got) / np.asarray(want) - 1)) > 1e-3
