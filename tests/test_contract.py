"""Every public transformation keeps the contract of Optax, alone and composed."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn

TREE = {
    "dense": {"w": jnp.arange(24.0).reshape(8, 3) - 9, "b": jnp.ones(3, jnp.bfloat16)},
    "frozen": None,
    "masked": optax.MaskedNode(),
    "layers": jnp.linspace(-2, 2, 32).reshape(2, 8, 2),
    "scale": jnp.float16(0.5),
}
TRANSFORMATIONS = {
    "whole_tree": lambda: gn.clip_by_norm(1.0),
    "per_leaf": lambda: gn.clip_by_norm(1.0, granularity=gn.per_leaf()),
    "stacked": lambda: gn.clip_by_leaf_norm(1.0, stacked_axes={"layers": 0}),
    "per_group": lambda: gn.clip_by_norm(
        1.0, granularity=gn.per_group({"dense/.*": "x", "layers": "y"})
    ),
    "per_unit": lambda: gn.clip_by_norm(
        1.0, granularity=gn.per_unit(), norm=gn.norms.lp(3), nonfinite="zero"
    ),
    "clip": lambda: gn.clip(1.0),
    "clip_by_block_rms": lambda: gn.clip_by_block_rms(1.0),
    "clip_by_global_norm": lambda: gn.clip_by_global_norm(
        optax.linear_schedule(1, 0, 9)
    ),
    "adaptive_grad_clip": lambda: gn.adaptive_grad_clip(0.01),
    "clip_by_leaf_norm": lambda: gn.clip_by_leaf_norm(1.0, nonfinite="drop"),
    "clip_by_group_norm": lambda: gn.clip_by_group_norm({"layers": 1.0, ".*": 2.0}),
    "clip_by_unit_norm": lambda: gn.clip_by_unit_norm(1.0),
    "autoclip": lambda: gn.autoclip(window=5, rearm_after=3),
    "zclip": lambda: gn.zclip(granularity=gn.per_unit(), rearm_after=3),
    "adagc": lambda: gn.adagc(stacked_axes={"layers": 0}, rearm_after=3),
    "clip_by_ema_norm": lambda: gn.clip_by_ema_norm(1.5),
    "aggc": lambda: gn.aggc({"layers": "x", ".*": "y"}, low=0.5, high=2.0),
    "adagn": gn.adagn,
    "adaclip": lambda: gn.adaclip(nonfinite="drop"),
    "clip_by_quantile": lambda: gn.clip_by_quantile(rearm_after=3),
    "clip_by_rolling_sigma": lambda: gn.clip_by_rolling_sigma(window=4),
    "clip_by_second_moment": gn.clip_by_second_moment,
    "rules by group": lambda: gn.clip_by_group_norm(
        {"layers": gn.thresholds.percentile(50, window=3), ".*": 1.0}
    ),
    "smooth_clip": lambda: gn.smooth_clip(1.0),
    "normalize_by_norm": gn.normalize_by_norm,
    "skip_step": lambda: gn.skip_step(
        optax.chain(gn.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        gn.thresholds.rolling_sigma(6.0, window=4),
    ),
    "reset_state_every": lambda: gn.reset_state_every(
        optax.chain(gn.adaclip(), optax.scale_by_adam()), 2, warmup_steps=2
    ),
    "add_gaussian_noise": lambda: gn.add_gaussian_noise(
        1.0, 1.0, expected_batch_size=4, key=jax.random.key(0)
    ),
    "with_residual": lambda: gn.with_residual(gn.clip_by_global_norm(1.0)),
    "watch": lambda: gn.watch(optax.adamw(1e-3), window=4),
    "watch a clip": lambda: gn.watch(
        optax.chain(gn.clip_by_leaf_norm(1.0), optax.adamw(1e-3)),
        groups={"dense/.*": "x"},
        record=("grad", "update"),
    ),
}
transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)
WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.scale_by_adam(), tx),
    "masked": lambda tx: optax.masked(
        tx, lambda tree: jax.tree.map(lambda x: jnp.ndim(x) > 0, tree)
    ),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)},
        lambda tree: jax.tree.map(lambda x: "ab"[jnp.ndim(x) == 0], tree),
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.fixture(autouse=True)
def relaxed():
    """Optax promotes silently, here and there."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)


def avals(fun, *args):
    """The structure, shapes, dtypes and weak types of what a function returns."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(fun, *args))
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def grads_at(step):
    return jax.tree.map(lambda x: x * jnp.asarray(1 + step, x.dtype), TREE)


@transformations
def test_init_takes_shapes_and_update_keeps_the_state_as_init_made_it(name):
    tx = TRANSFORMATIONS[name]()
    made = avals(tx.init, TREE)
    assert made == avals(lambda: tx.init(shapes(TREE)))
    state = jax.eval_shape(tx.init, TREE)
    assert made == avals(lambda s: tx.update(TREE, s, TREE)[1], state)
    updates, _ = jax.eval_shape(tx.update, TREE, state, TREE)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes(TREE))


@transformations
def test_float64_keeps_its_dtype_and_its_state(name):
    with jax.enable_x64(True):
        tree = {k: jax.ShapeDtypeStruct((4, 2), jnp.float64) for k in ("layers", "b")}
        if name == "watch a clip" or name == "per_group":
            tree = {"dense": {"b": tree["b"]}, "layers": tree["layers"]}
        tx = TRANSFORMATIONS[name]()
        state = jax.eval_shape(tx.init, tree)
        assert avals(tx.init, tree) == avals(
            lambda *a: tx.update(*a)[1], tree, state, tree
        )
        updates, after = jax.eval_shape(tx.update, tree, state, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
        for metrics in gn.find(after, gn.ClipMetrics):
            assert metrics.norms.dtype == jnp.float64


@transformations
def test_it_compiles_once_with_donation(name):
    tx = TRANSFORMATIONS[name]()
    traces = []

    def step(state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, TREE)
        return state, updates

    jitted = jax.jit(step, donate_argnums=0)
    state = tx.init(TREE)
    for k in range(3):
        state, updates = jitted(state, grads_at(k))
    assert len(traces) == 1
    assert jitted._cache_size() == 1
    assert jax.tree.structure(updates) == jax.tree.structure(TREE)


@transformations
def test_flax_saves_its_state_and_brings_it_back(name):
    state = TRANSFORMATIONS[name]().init(TREE)
    ones = jax.tree.map(jnp.ones_like, state)
    found = flax.serialization.from_bytes(state, flax.serialization.to_bytes(ones))
    chex.assert_trees_all_equal(found, ones)


@transformations
def test_it_ignores_extra_arguments_and_passes_absent_leaves(name):
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())

    def run(state):
        return tx.update(TREE, state, TREE, value=jnp.float32(1), unexpected="x")[0]

    updates = jax.eval_shape(run, jax.eval_shape(tx.init, TREE))
    assert updates["frozen"] is None
    assert updates["masked"] == optax.MaskedNode()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "name",
    [
        *("whole_tree", "stacked", "per_unit", "clip", "adaptive_grad_clip", "watch"),
        *("autoclip", "zclip", "skip_step", "with_residual"),
    ],
)
def test_it_rides_in_scan_inside_the_wrappers_of_optax(name, wrapper):
    tx = optax.with_extra_args_support(WRAPPERS[wrapper](TRANSFORMATIONS[name]()))
    tree = {k: TREE[k] for k in ("layers", "scale")} | {"w": TREE["dense"]["w"]}

    def run():
        state = tx.init(tree)
        step = lambda state, _: (tx.update(tree, state, tree)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, length=2)[0]

    record = jax.eval_shape(run)
    found = gn.find(record, gn.WatchState if name == "watch" else gn.ClipMetrics)
    assert len(found) == (0 if name == "clip" else 2 if wrapper == "chain" else 1)
    if found and name != "watch":
        assert set(jax.eval_shape(lambda: gn.scalars(run()))) >= {
            "clip/scale",
            "clip/limit",
            "nonfinite/count",
        }


def updates_of(tx, *steps, params=None):
    state = tx.init(steps[0] if params is None else params)
    for grads in steps:
        updates, state = tx.update(grads, state, params)
    return updates, state


PAIR = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}


def test_a_masked_clip_has_no_part_in_what_is_masked():
    tx = optax.masked(gn.clip_by_global_norm(1.0), {"a": True, "b": False})
    updates, state = updates_of(tx, PAIR)
    chex.assert_trees_all_close(
        updates, {"a": jnp.array([0.6, 0.8]), "b": PAIR["b"]}, rtol=1e-6
    )
    assert gn.scalars(state)["grad_norm/global_preclip"] == pytest.approx(5)


def test_a_partitioned_clip_has_a_norm_for_each_label():
    clips = {"x": gn.clip_by_global_norm(1.0), "y": gn.clip_by_global_norm(6.0)}
    updates, state = updates_of(optax.partition(clips, {"a": "x", "b": "y"}), PAIR)
    chex.assert_trees_all_close(
        updates, {"a": jnp.array([0.6, 0.8]), "b": jnp.array([6.0])}, rtol=1e-6
    )
    record = gn.scalars(state)
    assert (record["clip/scale"], record["clip2/clip/scale"]) == pytest.approx(
        (0.2, 0.5)
    )


def test_multi_steps_clips_the_mean_of_the_gradients():
    tx = optax.MultiSteps(gn.clip_by_global_norm(1.0), 2).gradient_transformation()
    updates, _ = updates_of(tx, PAIR, jax.tree.map(lambda x: -x / 3, PAIR))
    expected = jax.tree.map(lambda x: x / 13, PAIR)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (gn.clip_by_global_norm, "max_norm"),
        (gn.clip_by_norm, "threshold"),
        (gn.clip_by_leaf_norm, "max_norm"),
        (gn.clip_by_unit_norm, "max_norm"),
        (gn.clip_by_block_rms, "threshold"),
        (gn.adaptive_grad_clip, "clipping"),
        (gn.clip, "max_delta"),
    ],
)
def test_hyperparameters_may_be_injected_and_scheduled(make, argument):
    grads = {"w": jnp.array([2.0, -2.0])}
    limit = lambda step: 0.25 / (1.0 + step)  # noqa: E731
    tx = optax.inject_hyperparams(make)(**{argument: limit})
    updates, state = updates_of(tx, grads, grads, grads, params=grads)
    expected, _ = updates_of(make(0.25 / 3), grads, params=grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    state.hyperparams[argument] = jnp.float32(0)
    assert avals(tx.init, grads) == avals(
        lambda s: tx.update(grads, s, grads)[1], state
    )


def test_apply_if_finite_sees_a_nan_that_was_passed_on():
    tx = optax.apply_if_finite(gn.clip_by_global_norm(1.0), 5)
    bad = PAIR | {"b": jnp.array([jnp.nan])}
    updates, state = updates_of(tx, PAIR, bad)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PAIR))
    assert state.total_notfinite == 1
    assert gn.scalars(state)["nonfinite/count"] == 0


def test_the_record_is_found_by_name_and_by_kind_also_inside_jit():
    tx = optax.chain(
        optax.chain(gn.clip_by_leaf_norm(1.0), optax.scale_by_adam()), optax.scale(-1.0)
    )
    _, state = updates_of(tx, PAIR)
    [metrics] = gn.find({"opt": (state,)}, gn.ClipMetrics)
    assert optax.tree.get(state, "ClipMetrics") is metrics
    assert optax.tree.get(state, "metrics") is metrics
    assert optax.tree.get(state, "count") == 1
    on_host = gn.scalars(state)
    assert all(type(x) in (float, int) for x in on_host.values())
    inside = jax.jit(gn.scalars)(state)
    chex.assert_trees_all_close(inside, on_host)
    assert on_host == pytest.approx(
        {
            "grad_norm/part_min_preclip": 5,
            "grad_norm/part_max_preclip": 12,
            "clip/limit": 1,
            "clip/scale": 1 / 12,
            "clip/fraction": 1,
            "clip/rate": 1,
            "clip/consecutive": 1,
            "nonfinite/count": 0,
            "nonfinite/first_leaf": -1,
        }
    )


@functools.cache
def sharded_params(kind):
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), (getattr(jax.sharding.AxisType, kind),) * 2
    )
    specs = {"w": jax.P("x", "y"), "layers": jax.P(None, "x", "y"), "b": jax.P("y")}
    rng = np.random.default_rng(0)
    sizes = {"w": (8, 4), "layers": (2, 8, 2), "b": (6,)}
    plain = {k: rng.normal(size=s).astype(np.float32) for k, s in sizes.items()}
    put = {
        k: jax.device_put(x, jax.NamedSharding(mesh, specs[k]))
        for k, x in plain.items()
    }
    return mesh, plain, put


SHARDED = {
    "global": gn.clip_by_global_norm(1.0),
    "stacked": gn.clip_by_leaf_norm(1.0, stacked_axes={"layers": 0}),
    "agc": gn.adaptive_grad_clip(0.1),
    "watched rms": gn.watch(gn.clip_by_block_rms(0.5), window=2),
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_is_unsharded_and_the_state_stays_where_it_was(name, kind):
    tx = SHARDED[name]
    mesh, plain, put = sharded_params(kind)
    expected = jax.jit(tx.update)(plain, tx.init(plain), plain)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(put)
        updates, after = jax.jit(tx.update)(put, state, put)
    chex.assert_trees_all_close(
        jax.device_get((updates, after)), jax.device_get(expected), rtol=1e-5, atol=1e-7
    )
    own = [
        [
            *gn.find(s, gn.ClipState),
            *((w.ring, w.rows) for w in gn.find(s, gn.WatchState)),
        ]
        for s in (state, after)
    ]
    for before, later in zip(*map(jax.tree.leaves, own), strict=True):
        assert later.sharding.is_equivalent_to(before.sharding, later.ndim)
    for x, out in zip(jax.tree.leaves(put), jax.tree.leaves(updates), strict=True):
        assert out.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_a_second_call_outside_of_jit_compiles_nothing(caplog):
    clip, grads = gn.clip_by_global_norm(1.0), {"a": jnp.ones(3), "b": jnp.ones(7)}
    state = clip.init(grads)
    clip.update(grads, state)
    gn.leaf_norms(grads)
    with jax.log_compiles():
        clip.update(grads, state)
        gn.leaf_norms(grads)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
