"""`watch` keeps the last rows of norms, as a Python loop would have written them."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax.telemetry import columns

from .references import norms as reference

SHAPES = {"a": (2, 3), "b": (4,)}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def stream(steps):
    rng = np.random.default_rng(0)
    return [
        {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(steps)
    ]


def run(tx, grads, params, losses=None):
    """Returns the states after each step, and the updates and parameters of each."""
    state, step = tx.init(params), jax.jit(tx.update)
    for k, g in enumerate(grads):
        value = {} if losses is None else {"value": losses[k]}
        updates, after = step(g, state, params, **value)
        yield state, updates, params, after
        state, params = after, optax.apply_updates(params, updates)


def leaf_norms(tree):
    return [reference.norm([tree[k]]) for k in sorted(SHAPES)]


def test_rows_are_those_of_a_loop_and_the_ring_wraps():
    window, grads = 4, stream(11)
    losses = np.linspace(3, 1, 11).astype(np.float32)
    params = stream(1)[0]
    tx = gn.watch(optax.chain(gn.clip_by_leaf_norm(1.5), optax.sgd(0.1)), window=window)
    expected = np.zeros((window, 10), np.float32)
    limit, steps = 1.5, run(tx, grads, params, losses)
    for k, (_, updates, params_before, after) in enumerate(steps):
        sizes = np.array(leaf_norms(grads[k]))
        clip = [limit, np.min(np.minimum(1, limit / sizes)), np.mean(sizes > limit)]
        row = [sizes, leaf_norms(updates), leaf_norms(params_before), [losses[k]], clip]
        expected[k % window] = np.concatenate(row)
        assert int(after.rows) == k + 1
        np.testing.assert_allclose(after.ring, expected, rtol=1e-5)


def test_columns_name_what_the_rows_hold():
    assert columns({"b": jnp.ones(3), "a": {"w": jnp.ones((2, 2))}}) == (
        *("grad/a/w", "grad/b", "update/a/w", "update/b", "param/a/w", "param/b"),
        *("loss", "clip/limit", "clip/scale", "clip/fraction"),
    )


@pytest.mark.parametrize(
    "record",
    [("grad",), ("update",), ("param",), ("update", "grad"), ("param", "grad")],
)
def test_a_subset_may_be_recorded_in_any_order_and_is_named_as_it_is_kept(record):
    grads, params = {"w": jnp.full(4, 2.0)}, {"w": jnp.full(4, 3.0)}
    tx = gn.watch(optax.sgd(0.5), window=1, record=record)
    _, state = tx.update(grads, tx.init(params), params)
    row = dict(zip(columns(params, record=record), state.ring[0].tolist(), strict=True))
    sizes = {"grad/w": 4.0, "update/w": 2.0, "param/w": 6.0}
    assert {k: v for k, v in row.items() if k in sizes} == {
        f"{kind}/w": sizes[f"{kind}/w"] for kind in record
    }


def test_what_is_not_known_is_nan_and_what_is_not_finite_is_kept():
    tx = gn.watch(optax.sgd(1.0), window=2, record=("grad",))
    grads = {"a": jnp.array([jnp.inf]), "b": jnp.array([jnp.nan]), "c": jnp.zeros(2)}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(state.ring[0], [np.inf, np.nan, 0, *[np.nan] * 4])
    np.testing.assert_array_equal(state.ring[1], np.zeros(7))


def test_the_outermost_clip_is_the_one_recorded():
    inner = optax.chain(gn.clip_by_global_norm(1.0), gn.clip_by_leaf_norm(0.5))
    tx = gn.watch(inner, window=1, record=("grad",))
    grads = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state.ring[0], [5, np.nan, 1, 0.2, 1], rtol=1e-6)


def test_leaves_may_be_watched_by_group_and_layer_by_layer():
    grads = {"a": jnp.ones((2, 9)), "b": jnp.full(4, 2.0), "c": jnp.full(16, 3.0)}
    groups = {"a|b": "x", "c": "y"}
    rows = {}
    for key, value in {"groups": groups, "stacked_axes": {"a": 0}}.items():
        tx = gn.watch(optax.sgd(1.0), window=1, record=("grad",), **{key: value})
        _, state = tx.update(grads, tx.init(grads))
        names = columns(grads, record=("grad",), **{key: value})
        rows[key] = dict(zip(names[:-4], state.ring[0, :-4].tolist(), strict=True))
    expected = {"grad/x": math.sqrt(34), "grad/y": 12}
    assert rows["groups"] == pytest.approx(expected)
    layers = {"grad/a[0]": 3, "grad/a[1]": 3, "grad/b": 4, "grad/c": 12}
    assert rows["stacked_axes"] == pytest.approx(layers)


def test_updates_pass_through_bit_for_bit():
    inner = optax.chain(gn.clip_by_global_norm(0.5), optax.adamw(1e-2))
    params = stream(1)[0]
    watched = run(gn.watch(inner, window=2), stream(3), params)
    alone = run(inner, stream(3), params)
    for (_, ours, _, state), (_, theirs, _, inner_state) in zip(
        watched, alone, strict=True
    ):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
        chex.assert_trees_all_close(state.inner_state, inner_state, rtol=1e-6)
    eager, _ = gn.watch(inner).update(params, gn.watch(inner).init(params), params)
    chex.assert_trees_all_equal(
        eager, inner.update(params, inner.init(params), params)[0]
    )


def test_extra_arguments_and_the_loss_reach_what_is_watched():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    init = optax.init_empty_state
    tx = gn.watch(optax.GradientTransformationExtraArgs(init, update), record=("grad",))
    grads = {"w": jnp.ones(1)}
    state = tx.init(grads)
    tx.update(grads, state, value=2.0, key="k")
    assert seen == {"value": 2.0, "key": "k"}
    seen.clear()
    _, after = tx.update(grads, state)
    assert seen == {}
    assert math.isnan(after.ring[0, 1])


def test_low_precision_norms_are_recorded_in_float32():
    grads = {"w": jnp.full(9, 100, jnp.float16), "c": jnp.full(4, 3e19)}
    tx = gn.watch(optax.identity(), window=1, record=("grad", "update"))
    _, state = tx.update(grads, tx.init(grads))
    assert state.ring.dtype == jnp.float32
    np.testing.assert_allclose(state.ring[0, :4], [6e19, 300, 6e19, 300], rtol=1e-6)


def test_a_watch_inside_a_watch_is_found_outermost_first():
    inner = gn.watch(optax.sgd(1.0), window=2, record=("grad",))
    tx = gn.watch(optax.chain(inner, optax.identity()), window=3)
    state = tx.init({"w": jnp.ones(1)})
    assert [len(s.ring) for s in gn.find([state], gn.WatchState)] == [3, 2]


def test_a_second_clip_is_named_apart():
    tx = optax.chain(gn.clip_by_global_norm(1.0), gn.clip_by_leaf_norm(0.5))
    grads = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update(grads, tx.init(grads))
    record = gn.scalars(state)
    assert record["grad_norm/global_preclip"] == pytest.approx(5)
    assert record["clip2/grad_norm/part_max_preclip"] == pytest.approx(1)
    assert (record["clip/scale"], record["clip2/clip/scale"]) == pytest.approx(
        (0.2, 0.5)
    )


@pytest.mark.parametrize("every", [2, 3, 7])
def test_one_of_every_few_updates_is_recorded_as_it_would_be_otherwise(every):
    grads, params, losses = stream(7), stream(1)[0], np.arange(7.0)
    inner = optax.chain(gn.clip_by_global_norm(1.5), optax.sgd(0.1))
    *_, all_rows = (after for *_, after in run(gn.watch(inner), grads, params, losses))
    tx = gn.watch(inner, window=3, every=every)
    *_, state = (after for *_, after in run(tx, grads, params, losses))
    recorded = list(range(0, 7, every))[-3:]
    number = len(range(0, 7, every))
    assert (int(state.step), int(state.rows)) == (7, number)
    order = np.arange(max(0, number - 3), number) % 3
    np.testing.assert_array_equal(state.steps[order], recorded)
    np.testing.assert_array_equal(
        state.ring[order], np.asarray(all_rows.ring)[recorded]
    )


def test_updates_pass_through_whether_a_step_is_recorded_or_not():
    grads, params = stream(5), stream(1)[0]
    inner = optax.chain(gn.clip_by_global_norm(1.5), optax.adam(0.1))
    plain = [updates for _, updates, _, _ in run(inner, grads, params)]
    watched = [u for _, u, _, _ in run(gn.watch(inner, every=2), grads, params)]
    chex.assert_trees_all_equal(watched, plain)


def test_where_every_is_above_1_a_step_that_is_not_recorded_measures_nothing():
    tx = gn.watch(optax.sgd(0.1), every=3)
    params = stream(1)[0]
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    before, _, after = text.partition("stablehlo.case")
    assert after
    assert "stablehlo.sqrt" not in before.split("func.func public")[1]


def test_details_of_the_gradients_are_recorded_on_request():
    details = ("grad_max", "grad_zeros", "grad_nonfinite")
    grads = {
        "a": jnp.array([[0.0, -7.0, 3.0], [0.0, jnp.nan, jnp.inf]]),
        "b": jnp.array([0.0, 1.0, -2.0, 0.5]),
    }
    tx = gn.watch(optax.sgd(0.1), record=("grad", *details))
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    names = columns(grads, record=("grad", *details))
    row = dict(zip(names, np.asarray(state.ring[0]), strict=True))
    assert np.isnan(row["grad_max/a"])
    assert row["grad_max/b"] == 2
    assert (row["grad_zeros/a"], row["grad_zeros/b"]) == (2, 1)
    assert (row["grad_nonfinite/a"], row["grad_nonfinite/b"]) == (2, 0)


def test_details_of_layers_and_groups_are_those_of_their_entries():
    x = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    x[1, :2] = 0
    tree = {"a": jnp.asarray(x), "b": jnp.zeros(4)}
    record = ("grad_max", "grad_zeros")
    for how, parts in (
        ({"stacked_axes": {"a": 0}}, [x[0], x[1], x[2], np.zeros(4)]),
        ({"groups": {".*": "all"}}, [np.concatenate([x.ravel(), np.zeros(4)])]),
    ):
        tx = gn.watch(optax.sgd(0.1), record=record, **how)
        _, state = tx.update(tree, tx.init(tree))
        largest = [np.abs(part).max() for part in parts]
        zeros = [np.sum(part == 0) for part in parts]
        np.testing.assert_array_equal(
            state.ring[0, : 2 * len(parts)], [*largest, *zeros]
        )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"every": 0}, r"every=.*at least 1.*got 0"),
        ({"every": 1.5}, r"every=.*got 1\.5"),
        ({"window": 0}, r"window=.*at least 1 row, got 0"),
        ({"record": ()}, r"record=.*grad_nonfinite.*got \(\)"),
        ({"record": ("grads",)}, r"record=.*got \('grads',\)"),
        ({"record": "grad"}, r"record=.*got 'grad'"),
    ],
)
def test_settings_that_cannot_be_are_refused(how, words):
    with pytest.raises((ValueError, TypeError), match=words):
        gn.watch(optax.sgd(0.1), **how)


def test_updates_of_another_tree_are_refused():
    params = stream(1)[0]
    tx = gn.watch(optax.sgd(0.1), record=("grad",))
    with pytest.raises(ValueError, match=r"5 columns.*a tree with 6"):
        tx.update({"a": params["a"]}, tx.init(params))


def test_a_clip_of_another_norm_or_of_other_arrays_takes_its_own_when_watched():
    grads, params = stream(1)[0], stream(2)[1]
    for clip in (
        optax.chain(optax.scale(0.5), gn.clip_by_global_norm(1.0)),
        gn.clip_by_norm(1.0, norm=gn.norms.linf),
    ):
        plain, _ = clip.update(grads, clip.init(params), params)
        tx = gn.watch(clip)
        watched, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        chex.assert_trees_all_close(watched, plain, rtol=1e-6)
