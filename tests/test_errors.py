"""Each refusal names the function, the argument, what it got, and a way out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax import telemetry

pytestmark = pytest.mark.usefixtures("strict")

TREE = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
MIXED = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.int32)}


def update(clip, grads, *rest):
    return clip.update(grads, clip.init(TREE), *rest)


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (gn.global_norm, "global_norm"),
        (gn.leaf_norms, "leaf_norms"),
        (lambda tree: gn.group_norms(tree, {".*": "x"}), "group_norms"),
        (gn.unit_norms, "unit_norms"),
        (gn.unitwise_norm, "unit_norms"),
        (gn.per_leaf().measure, "per_leaf"),
        (gn.clip_by_norm(1.0).init, "clip_by_norm"),
        (lambda tree: update(gn.clip_by_norm(1.0), tree), "clip_by_norm"),
        (
            lambda tree: gn.per_example_global_norm_clip(tree, 1.0),
            "per_example_global_norm_clip",
        ),
    ],
)
@pytest.mark.parametrize("leaf", [jnp.ones(3, jnp.int32), jnp.ones(3, bool), 3])
def test_a_leaf_that_holds_no_real_numbers_is_refused_by_name(measure, name, leaf):
    dtype = jnp.asarray(leaf).dtype
    with pytest.raises(TypeError, match=rf"`{name}.*: leaf 'x/1' has dtype {dtype}"):
        measure({"x": [jnp.ones(3), leaf]})


@pytest.mark.parametrize(
    "order", [0, 0.5, -1, math.nan, -math.inf, "2", "fro", None, True]
)
@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (gn.global_norm, "global_norm"),
        (gn.leaf_norms, "leaf_norms"),
        (gn.unit_norms, "unit_norms"),
        (lambda tree, ord: gn.group_norms(tree, {".*": "x"}, ord=ord), "group_norms"),
    ],
)
def test_what_is_not_an_order_is_refused_by_name(measure, name, order):
    with pytest.raises(ValueError, match=rf"`{name}\(ord=\.\.\.\)` must be a number"):
        measure(TREE, ord=order)


ROWS = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
LIMITS = {
    "clip": (gn.clip, "max_delta"),
    "clip_by_norm": (gn.clip_by_norm, "threshold"),
    "clip_by_global_norm": (gn.clip_by_global_norm, "max_norm"),
    "clip_by_leaf_norm": (gn.clip_by_leaf_norm, "max_norm"),
    "clip_by_unit_norm": (gn.clip_by_unit_norm, "max_norm"),
    "clip_by_group_norm": (lambda c: gn.clip_by_group_norm({".*": c}), "max_norms"),
    "clip_by_block_rms": (gn.clip_by_block_rms, "threshold"),
    "constant": (gn.thresholds.constant, "limit"),
    "relative_to_params": (gn.thresholds.relative_to_params, "factor"),
    "per_example_global_norm_clip": (
        lambda c: gn.per_example_global_norm_clip(ROWS, c),
        "l2_norm_clip",
    ),
    "per_example_layer_norm_clip": (
        lambda c: gn.per_example_layer_norm_clip(ROWS, c),
        "global_l2_norm_clip",
    ),
}
limits = pytest.mark.parametrize("name", LIMITS)


@limits
@pytest.mark.parametrize("limit", [-1.0, math.nan, np.float32(-2), -math.inf])
def test_a_negative_limit_is_refused_by_name(name, limit):
    make, argument = LIMITS[name]
    message = rf"`{name}\({argument}=\.\.\.\)` must not be negative or NaN, got {limit}"
    with pytest.raises(ValueError, match=message):
        make(limit)


@limits
@pytest.mark.parametrize("limit", ["one", None, object()])
def test_a_limit_that_is_no_number_is_refused_by_name(name, limit):
    make, argument = LIMITS[name]
    with pytest.raises((TypeError, ValueError), match=rf"`{name}\({argument}=\.\.\.\)"):
        make(limit)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: gn.clip_by_norm(1.0, granularity="leaf"),
            TypeError,
            r"granularity=.*'leaf'",
        ),
        (
            lambda: gn.clip_by_norm(1.0, granularity=gn.per_leaf),
            TypeError,
            "granularity=",
        ),
        (lambda: gn.clip_by_norm(1.0, norm=2), TypeError, "norm=.*got 2"),
        (lambda: gn.clip_by_norm(1.0, shrink=min), TypeError, "shrink=.*got <built-in"),
        (
            lambda: gn.clip_by_norm(1.0, nonfinite="skip"),
            ValueError,
            "nonfinite=.*'skip'",
        ),
        (lambda: gn.clip_by_norm(1.0, eps=-1.0), ValueError, "eps=.*got -1.0"),
        (lambda: gn.clip_by_global_norm(1.0, nonfinite=None), ValueError, "nonfinite="),
        (lambda: gn.clip_by_group_norm(1.0), TypeError, "max_norms=.*got 1.0"),
        (lambda: gn.clip_by_group_norm({}), TypeError, "max_norms=.*got {}"),
        (lambda: gn.adaptive_grad_clip(0.1, eps=-1.0), ValueError, "floor=.*got -1.0"),
        (lambda: gn.thresholds.schedule(3.0), TypeError, "limit_fn=.*got 3.0"),
        (lambda: gn.watch(optax.adam), TypeError, "`watch.tx="),
        (lambda: gn.watch(optax.sgd(1.0), window=0), ValueError, "window=.*got 0"),
        (lambda: gn.watch(optax.sgd(1.0), record=()), ValueError, "record="),
        (
            lambda: gn.watch(optax.sgd(1.0), record="grad"),
            ValueError,
            "record=.*'grad'",
        ),
        (lambda: gn.watch(optax.sgd(1.0), record=("loss",)), ValueError, "record="),
        (lambda: gn.scalars({"a": 1}), ValueError, "found no clip"),
        (
            lambda: gn.watch(optax.sgd(1.0), groups={"a": "x"}, stacked_axes=0).init(
                TREE
            ),
            ValueError,
            r"watch\(groups=\.\.\., stacked_axes=",
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: gn.group_norms(TREE, {"encoder": "x"}),
            "group_norms.*'encoder' matches no",
        ),
        (lambda: gn.group_norms(TREE, {"A": "x"}), "The leaves are 'a', 'b'"),
        (lambda: gn.group_norms(TREE, {"(": "x"}), r"'\(' is not a regular expression"),
        (lambda: gn.group_norms(TREE, lambda name: None), "puts no leaf into a group"),
        (lambda: gn.group_norms(TREE, ["x"]), r"group_norms\(groups=\.\.\.\)` must be"),
        (
            lambda: gn.leaf_norms(TREE, stacked_axes={"c": 0}),
            "leaf_norms.*'c' matches no",
        ),
        (lambda: gn.leaf_norms(TREE, stacked_axes=1), "axis 1 of leaf 'b'"),
        (
            lambda: gn.unit_norms(TREE, axes={"a": 2}),
            r"unit_norms\(axes=.*axis 2 of leaf",
        ),
        (lambda: gn.unit_norms(jnp.ones((2,) * 6)), r"only up to 5 dimensions"),
        (lambda: gn.per_group({"a": "x"}, scaled={"b": "y"}).measure(TREE), "no norm"),
        (lambda: gn.clip_by_group_norm({"c": 1.0}).init(TREE), "'c' matches no leaf"),
        (
            lambda: update(gn.adaptive_grad_clip(0.1), TREE),
            r"update\(params=\.\.\.\)` must be given",
        ),
        (
            lambda: update(gn.watch(optax.sgd(1.0)), TREE),
            r"`watch.*update\(params=\.\.\.\)` must be given",
        ),
        (
            lambda: update(gn.watch(optax.identity()), {"a": jnp.ones(2)}, TREE),
            r"columns to record|columns",
        ),
        (
            lambda: gn.per_example_global_norm_clip([jnp.ones(2), jnp.ones(3)], 1.0),
            "every leaf needs the examples along its axis 0",
        ),
        (
            lambda: gn.per_example_layer_norm_clip([jnp.ones(())], 1.0),
            "every leaf needs the examples along its axis 0",
        ),
        (
            lambda: gn.thresholds.each([gn.thresholds.constant(1.0)]).init(
                jnp.zeros(2)
            ),
            "one rule for each part, got 1 rules",
        ),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_limit_that_is_traced_is_not_refused():
    jax.jit(lambda c: gn.clip_by_global_norm(c).init(TREE))(-1.0)


def test_there_is_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'gradnorm'"):
        gn.gradnorm  # noqa: B018


def test_a_pattern_that_others_shadow_is_refused():
    with pytest.raises(
        ValueError, match=r"'w' matches is taken by a pattern before it"
    ):
        gn.clip_by_group_norm({".*": 1.0, "w": 0.5}).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("limit", [None, "1", True, [None]])
def test_a_limit_that_is_no_number_is_refused(limit):
    with pytest.raises(TypeError, match=r"max_norm=...\)` must be a number, got"):
        gn.clip_by_global_norm(limit)


def test_a_known_negative_array_is_refused_like_a_number():
    with pytest.raises(ValueError, match=r"must not be negative or NaN, got -1"):
        gn.clip_by_global_norm(jnp.float32(-1))


def test_as_many_limits_as_parts_or_one_are_wanted():
    clip = gn.clip_by_leaf_norm(np.ones(3))
    grads = [jnp.ones(2), jnp.ones(2)]
    with pytest.raises(ValueError, match=r"each of the \(2,\) parts .* shape \(3,\)"):
        clip.update(grads, clip.init(grads))


def test_a_state_of_another_tree_or_kind_is_refused():
    clip = gn.clip_by_leaf_norm(1.0)
    state = clip.init([jnp.ones(2), jnp.ones(2)])
    with pytest.raises(ValueError, match=r"shape \(1,\), but `init` .* shape \(2,\)"):
        clip.update([jnp.ones(2)], state)
    with pytest.raises(TypeError, match=r"must be the `ClipState` .* got a EmptyState"):
        clip.update([jnp.ones(2)], optax.EmptyState())


@pytest.mark.parametrize("norms", [np.ones(3), {"a": 1.0, "b": 2.0}])
def test_norms_of_another_shape_are_refused(norms):
    clip = gn.clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=r"update\(norms=...\)` must be one array of"):
        clip.update(jnp.ones(2), clip.init(jnp.ones(2)), norms=norms)


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(TypeError, match=r"leaf 'a' is 'x', which is no array"):
        gn.global_norm({"a": "x"})


def test_parts_of_one_name_are_not_recorded():
    tree = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"two parts of the tree have the name 'a/b'"):
        telemetry.columns(tree)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: r.percentile(101.0),
            r"percentile\(q=...\)` must be between 0 and 100",
        ),
        (
            lambda r: r.percentile(10.0, window=0),
            r"window=...\)` must be at least 1, got",
        ),
        (
            lambda r: r.quantile(50.0),
            r"quantile\(q=.* between 0 and 1, got 50.* percent",
        ),
        (
            lambda r: r.quantile(0.5, start=0.0),
            r"quantile\(start=...\)` must be between",
        ),
        (
            lambda r: r.z_score(-1.0),
            r"z_score\(z=...\)` must be between 0 and inf, got -1",
        ),
        (lambda r: r.z_score(2.0, decay=1.0), r"z_score\(decay=.* below 1, got 1.0"),
        (
            lambda r: r.z_score(2.0, warmup_steps=1),
            r"warmup_steps=...\)` must be at least 2",
        ),
        (
            lambda r: r.ema_relative(1.0, warmup_steps=0),
            r"ema_relative\(warmup_steps=.* 1",
        ),
        (
            lambda r: r.ema_band(2.0, 1.0),
            r"must be a band: low <= high, got 2.0 and 1.0",
        ),
        (
            lambda r: r.ema_band(0.5, 2.0, feed="both"),
            r"ema_band\(feed=...\)` must be one of .* 'both'",
        ),
        (lambda r: r.max_ema(-1.0), r"max_ema\(factor=...\)` must be between"),
        (
            lambda r: r.moment_ratio(decay_square=-0.1),
            r"decay_square=...\)` must be at l",
        ),
        (
            lambda r: r.second_moment(math.nan),
            r"second_moment\(factor=...\)` must be betw",
        ),
        (
            lambda r: r.rolling_sigma(3.0, window=1),
            r"rolling_sigma\(window=.* at least 2",
        ),
        (
            lambda r: r.percentile(1.0, warmup_limit=-1.0),
            r"percentile\(warmup_limit=...\)` must not be",
        ),
        (
            lambda r: r.percentile(1.0, rearm_after=0),
            r"rearm_after=...\)` must be at least 1",
        ),
        (
            lambda r: gn.zclip(mode="zscore"),
            r"zclip\(mode=...\)` must be one of .*'zscore'",
        ),
    ],
)
def test_a_number_outside_of_its_range_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(gn.thresholds)


@pytest.mark.parametrize("steps", [2.5, True, "3", np.ones(2, int)])
def test_what_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(
        TypeError, match=r"rearm_after=...\)` must be a whole number of"
    ):
        gn.thresholds.percentile(10.0, rearm_after=steps)


OF_EXAMPLES = {
    "clipped_grad": lambda loss_fn, **how: gn.clipped_grad(loss_fn, 1.0, **how),
    "explain_norms": gn.explain_norms,
    "per_example_norms": gn.per_example_norms,
    "value_and_per_example_norms": gn.value_and_per_example_norms,
}


@pytest.mark.parametrize("name", OF_EXAMPLES)
@pytest.mark.parametrize(
    ("loss_fn", "how", "error", "message"),
    [
        (3, {}, TypeError, r"\(loss_fn\)` must be a function.*got 3"),
        (jnp.dot, {"argnums": 1}, ValueError, r"\(argnums=1, batch_argnums=1.*differ"),
        (jnp.dot, {"granularity": 2}, TypeError, r"\(granularity=.*whole_tree.*got 2"),
    ],
)
def test_what_has_no_examples_is_refused_by_name(name, loss_fn, how, error, message):
    with pytest.raises(error, match=f"^`{name}{message}"):
        OF_EXAMPLES[name](loss_fn, **how)


@pytest.mark.parametrize("name", OF_EXAMPLES)
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (np.ones(4), np.ones(4)),
            {},
            r"argument 2 has 4 .* Give \(1, 2\) there if it",
        ),
        ((np.ones(4),), {"y": np.ones(4)}, "argument 'y' has 4 .* Give it by position"),
    ],
)
def test_labels_that_no_argument_names_are_refused(name, args, kwargs, message):
    measure = OF_EXAMPLES[name](lambda w, x, y: (w * x - y) ** 2)
    with pytest.raises(
        ValueError, match=rf"^`{name}\(batch_argnums=\(1,\)\)`: {message}"
    ):
        measure(1.0, *args, **kwargs)


def test_what_has_no_entry_for_each_example_is_given_to_all():
    loss_fn = lambda w, x, shift: jnp.sum(w * x - shift)  # noqa: E731
    norms = gn.per_example_norms(loss_fn)(1.0, np.arange(4.0), np.ones(3))
    np.testing.assert_allclose(norms, 3 * np.arange(4.0))


@pytest.mark.parametrize("name", ["per_example_norms", "value_and_per_example_norms"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"microbatch_size": 0}, r"\(microbatch_size=\.\.\.\)` must be at least 1"),
        ({"implementation": "two_pass"}, r"\(implementation=.*'ghost', 'vmap'.*got"),
    ],
)
def test_ways_to_norms_of_examples_that_are_not_there_are_refused(name, how, message):
    with pytest.raises(ValueError, match=f"^`{name}{message}"):
        OF_EXAMPLES[name](jnp.dot, **how)
