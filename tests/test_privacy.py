"""The noise is what it is said to be, in every dtype and on every mesh."""

import functools
import math

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn
from gradnorm_jax import privacy

from .sharding.meshes import mapped, mesh_of, put

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(7)
LIMIT, MULTIPLIER, SIZE = 2.0, 1.5, 64
STDDEV = LIMIT * MULTIPLIER / SIZE
TREE = {
    "w": jnp.linspace(-60, 60, 24).reshape(8, 3),
    "half": jnp.ones(3, jnp.bfloat16),
    "frozen": None,
    "masked": optax.MaskedNode(),
    "scale": jnp.float16(0.5),
}
LARGE = {"a": jnp.zeros((300, 200)), "b": jnp.zeros((300, 200)), "c": jnp.zeros(60000)}


def noise(limit=LIMIT, multiplier=MULTIPLIER, *, key=KEY, size=SIZE, **how):
    return privacy.add_gaussian_noise(
        limit, multiplier, expected_batch_size=size, key=key, **how
    )


def updates_of(tx, *steps, **extra):
    state = tx.init(steps[0])
    found = []
    for grads in steps:
        updates, state = tx.update(grads, state, **extra)
        found.append(updates)
    return found, state


def avals(fun, *args):
    leaves, structure = jax.tree.flatten(jax.eval_shape(fun, *args))
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@functools.cache
def draws():
    """Noise alone: entries of three leaves over two steps, in units of its stddev."""
    steps, _ = updates_of(noise(), LARGE, LARGE)
    return [np.ravel(x) / STDDEV for tree in steps for x in jax.tree.leaves(tree)]


def test_the_noise_has_mean_0_and_the_standard_deviation_that_was_asked_for():
    for x in draws():
        assert abs(x.mean()) < 4 / math.sqrt(x.size)
        assert abs(x.std() - 1) < 4 / math.sqrt(2 * x.size)


def test_the_noise_is_normal():
    for x in draws():
        for bound, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
            spread = math.sqrt(share * (1 - share) / x.size)
            assert abs(np.mean(np.abs(x) < bound) - share) < 4 * spread


def test_leaves_steps_and_entries_have_independent_noise():
    rows = draws() + [np.roll(draws()[0], shift) for shift in (1, 200)]
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 5 / math.sqrt(rows[0].size)


def test_real_and_imaginary_parts_have_the_whole_noise_each():
    [updates], _ = updates_of(noise(), jnp.zeros(60000, jnp.complex64))
    for part in (updates.real, updates.imag):
        assert float(part.std()) == pytest.approx(STDDEV, rel=0.02)
    both = np.corrcoef(updates.real, updates.imag)[0, 1]
    assert abs(both) < 5 / math.sqrt(60000)


def test_the_same_key_gives_the_same_noise_and_another_key_another():
    first, _ = updates_of(noise(), TREE, TREE)
    again, _ = updates_of(noise(), TREE, TREE)
    chex.assert_trees_all_equal(first, again)
    [other, _], _ = updates_of(noise(key=jax.random.key(8)), TREE, TREE)
    assert np.all(other["w"] != first[0]["w"])
    assert np.all(first[0]["w"] != first[1]["w"])


def test_the_sum_is_divided_by_the_expected_size_and_not_by_another():
    [updates], state = updates_of(noise(multiplier=0.0, size=50), TREE)
    chex.assert_trees_all_equal(updates["w"], TREE["w"] / 50)
    assert state.stddev == 0
    [noised], state = updates_of(noise(), TREE)
    [alone], _ = updates_of(noise(), jax.tree.map(jnp.zeros_like, TREE))
    chex.assert_trees_all_close(noised["w"] - TREE["w"] / SIZE, alone["w"], atol=1e-6)
    assert float(state.stddev) == pytest.approx(STDDEV)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_for_a_narrow_leaf_is_that_of_float32_and_cast_last(dtype):
    narrow = {"x": jnp.linspace(-9, 9, 999).astype(dtype)}
    wide = {"x": narrow["x"].astype(jnp.float32)}
    [updates], _ = updates_of(noise(), narrow)
    [expected], _ = updates_of(noise(), wide)
    chex.assert_trees_all_equal(updates["x"], expected["x"].astype(dtype))


def test_float64_keeps_its_dtype_and_has_noise_in_all_its_bits():
    with jax.enable_x64(True):
        [updates], state = updates_of(noise(), {"x": jnp.zeros(100, jnp.float64)})
        assert updates["x"].dtype == state.stddev.dtype == jnp.float64
        narrowed = updates["x"].astype(jnp.float32).astype(jnp.float64)
        assert np.mean(narrowed != updates["x"]) > 0.9


def test_the_norm_may_follow_the_step_or_be_given_to_each_update():
    steps = [TREE] * 3
    [first, _, third], state = updates_of(noise(jnp.float32), *steps)
    [_, _, given], _ = updates_of(noise(None), *steps, l2_clip_norm=2.0)
    chex.assert_trees_all_equal(first["w"], TREE["w"] / SIZE)
    chex.assert_trees_all_equal(third, given)
    assert float(state.stddev) == pytest.approx(STDDEV)


def test_a_chain_hands_the_norm_on():
    tx = optax.chain(noise(None), optax.sgd(0.5))
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(
            TREE, tx.init(TREE), l2_clip_norm=jnp.float32(LIMIT), value=1.0
        )
    [alone], _ = updates_of(noise(), TREE)
    chex.assert_trees_all_equal(updates["w"], -0.5 * alone["w"])


def test_a_sum_that_is_not_finite_is_not_hidden():
    [updates], _ = updates_of(noise(), {"x": jnp.array([jnp.nan, jnp.inf, 1.0])})
    np.testing.assert_array_equal(np.isfinite(updates["x"]), [False, False, True])


def test_multi_steps_adds_up_microbatches_and_draws_the_noise_once():
    tx = optax.MultiSteps(noise(), 2, use_grad_mean=False)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(TREE)
        first, state = tx.update(TREE, state)
        second, state = tx.update(TREE, state)
    chex.assert_trees_all_equal(first["w"], jnp.zeros((8, 3)))
    [expected], _ = updates_of(noise(), jax.tree.map(lambda x: x + x, TREE))
    chex.assert_trees_all_close(second["w"], expected["w"], rtol=1e-6)
    assert state.inner_opt_state.step == 1


# What every transformation of this package promises.


def test_init_takes_shapes_and_update_keeps_the_state_as_init_made_it():
    tx = noise()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    made = avals(tx.init, TREE)
    assert made == avals(lambda: tx.init(shapes))
    state = jax.eval_shape(tx.init, TREE)
    assert made == avals(lambda s: tx.update(TREE, s, TREE)[1], state)
    updates, _ = jax.eval_shape(tx.update, TREE, state, TREE)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes)


def test_it_compiles_once_with_donation_and_agrees_with_what_is_not_compiled():
    tx = noise()
    step = jax.jit(lambda state, grads: tx.update(grads, state), donate_argnums=0)
    state, found = tx.init(TREE), []
    for _ in range(3):
        updates, state = step(state, TREE)
        found.append(updates["w"])
    assert step._cache_size() == 1
    eager, after = updates_of(tx, TREE, TREE, TREE)
    chex.assert_trees_all_close(found, [tree["w"] for tree in eager], rtol=1e-5)
    chex.assert_trees_all_equal(state.key_data, after.key_data)


def test_it_rides_in_scan_and_goes_on_from_what_was_saved():
    tx = noise()

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: tx.update(TREE, s)[::-1], state, length=3)

    state, _ = run(tx.init(TREE))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(tx.init(TREE), saved)
    chex.assert_trees_all_equal(run(restored), run(state))
    assert run(restored)[0].step == 6


@pytest.mark.parametrize("wrapper", ["masked", "partition", "apply_if_finite"])
def test_it_rides_in_scan_inside_the_wrappers_of_optax(wrapper):
    tree = {"w": TREE["w"], "b": jnp.ones(3)}
    tx = {
        "masked": optax.masked(noise(), {"w": True, "b": False}),
        "partition": optax.partition(
            {"x": noise(), "y": optax.sgd(1.0)}, {"w": "x", "b": "y"}
        ),
        "apply_if_finite": optax.apply_if_finite(noise(), 2),
    }[wrapper]
    tx = optax.with_extra_args_support(tx)

    def run():
        step = lambda s, _: (tx.update(tree, s, tree, value=1.0)[1], None)  # noqa: E731
        return jax.lax.scan(step, tx.init(tree), length=2)[0]

    with jax.numpy_dtype_promotion("standard"):
        found = jax.eval_shape(run)
        updates, _ = tx.update(tree, tx.init(tree), tree)
    assert optax.tree.get(found, "NoiseState").key_data.shape == (2,)
    if wrapper == "masked":
        chex.assert_trees_all_equal(updates["b"], tree["b"])
    assert not np.any(updates["w"] == tree["w"])


def test_numbers_may_be_injected():
    make = optax.inject_hyperparams(privacy.add_gaussian_noise, static_args="key")
    tx = make(lambda step: 1.0 + step, MULTIPLIER, expected_batch_size=SIZE, key=KEY)
    with jax.numpy_dtype_promotion("standard"):
        _, state = updates_of(tx, TREE["w"], TREE["w"])
    assert float(state.inner_state.stddev) == pytest.approx(2 * MULTIPLIER / SIZE)


# Sharded.


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_the_noise_is_the_same_however_the_leaves_are_sharded(kind):
    tx, mesh = noise(), mesh_of(kind)
    tree = {"w": np.zeros((8, 6), np.float32), "b": np.zeros(4, np.float32)}
    [expected], after = updates_of(tx, tree)
    sharded = put(mesh, tree, {"w": P("d", "t"), "b": P("t")})
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(sharded)
        updates, later = jax.jit(tx.update)(sharded, state, sharded)
    chex.assert_trees_all_close(jax.device_get(updates), expected, rtol=1e-5)
    np.testing.assert_array_equal(later.key_data, after.key_data)
    for x, out in zip(*map(jax.tree.leaves, (sharded, updates)), strict=True):
        assert out.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_each_device_draws_only_its_own_part(kind):
    tx, mesh = noise(), mesh_of(kind)
    tree = put(mesh, {"w": np.zeros((64, 128), np.float32)}, {"w": P("d", "t")})
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(tree)
        compiled = jax.jit(tx.update).lower(tree, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tree["w"].nbytes
    assert "all-" not in compiled.as_text()


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_shards_differ_and_copies_do_not(check_vma):
    specs = {"split": P("d"), "both": P("t", "d"), "whole": P()}
    tree = {
        "split": np.zeros((4, 50), np.float32),
        "both": np.zeros((2, 40, 25), np.float32),
        "whole": np.zeros(50, np.float32),
    }
    tx = noise(**({} if check_vma else {"specs": specs}))
    copies = {name: P(("d", "t"), *spec) for name, spec in specs.items()}

    def run(tree):
        updates, state = tx.update(tree, tx.init(tree), tree)
        return jax.tree.map(lambda x: x[None], updates), state.key_data

    out = ({name: P(("d", "t")) for name in copies}, P())
    run = mapped(run, mesh_of(), (specs,), out, check_vma=check_vma)
    found, key_data = jax.device_get(run(put(mesh_of(), tree, specs)))
    _, after = updates_of(tx, tree) if check_vma else updates_of(noise(), tree)
    np.testing.assert_array_equal(key_data, after.key_data)
    by_place = {name: x.reshape(4, 2, -1) for name, x in found.items()}
    whole = by_place["whole"].reshape(8, -1)
    np.testing.assert_array_equal(whole, np.tile(whole[0], (8, 1)))
    split = by_place["split"]
    np.testing.assert_array_equal(split[:, 0], split[:, 1])
    assert np.unique(split[:, 0]).size == split[:, 0].size
    assert np.unique(by_place["both"]).size == by_place["both"].size
    assert by_place["both"].std() == pytest.approx(STDDEV, rel=0.1)


def test_a_sum_over_the_examples_of_one_device_is_refused():
    mesh, tx = mesh_of(), noise()
    params = {"w": np.ones((3, 2), np.float32)}
    batch = np.ones((8, 2), np.float32)

    def run(params, batch, *, summed):
        total = {"w": params["w"] * jnp.sum(batch)}
        if summed:
            total = jax.lax.psum(total, "d")
        return tx.update(total, tx.init(params), params)[0]

    def on_the_mesh(summed):
        local = functools.partial(run, summed=summed)
        over = mapped(local, mesh, ({"w": P()}, P("d")), {"w": P()})
        placed = put(mesh, params | {"batch": batch}, {"w": P(), "batch": P("d")})
        return over({"w": placed["w"]}, placed["batch"])

    with pytest.raises(gn.DistributedNormError, match=r"psum\(grads, \('d',\)\)"):
        on_the_mesh(summed=False)
    [expected], _ = updates_of(tx, {"w": jnp.full((3, 2), 16.0)})
    chex.assert_trees_all_close(jax.device_get(on_the_mesh(summed=True)), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: noise(-1.0), ValueError, r"noise\(l2_clip_norm=.*got -1.0"),
        (lambda: noise(math.inf), ValueError, "l2_clip_norm=.*got inf.*hidden by no"),
        (lambda: noise("1"), TypeError, "l2_clip_norm=.*must be a number, got '1'"),
        (lambda: noise(multiplier=-0.1), ValueError, "noise_multiplier=.*got -0.1"),
        (lambda: noise(multiplier=math.nan), ValueError, "noise_multiplier=.*got nan"),
        (lambda: noise(multiplier=None), TypeError, "noise_multiplier=.*got None"),
        (lambda: noise(size=0), ValueError, "expected_batch_size=.*got 0.*rate times"),
        (lambda: noise(key=0), TypeError, r"key=.*got 0\. .*PRNGKey"),
        (
            lambda: noise(key=jax.random.PRNGKey(0)),
            TypeError,
            r"key=.*got uint32\[2\]\. .*wrap_key_data",
        ),
        (
            lambda: noise(key=jax.random.split(KEY)),
            TypeError,
            r"key=.*one key.*got key<fry>\[2\]",
        ),
        (
            lambda: updates_of(noise(None), TREE),
            ValueError,
            "update.l2_clip_norm=.*must be given",
        ),
        (
            lambda: updates_of(noise(), TREE, l2_clip_norm=1.0),
            ValueError,
            r"given 1\.0, but .*was 2\.0 already",
        ),
        (
            lambda: updates_of(noise(None), TREE, l2_clip_norm=-1.0),
            ValueError,
            "update.l2_clip_norm=.*got -1.0",
        ),
        (
            lambda: noise().update(TREE, optax.EmptyState()),
            TypeError,
            "add_gaussian_noise.*NoiseState.*got a EmptyState",
        ),
        (
            lambda: noise().init({"x": jnp.ones(2, jnp.int32)}),
            TypeError,
            "add_gaussian_noise.*leaf 'x' has dtype int32",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nothing_that_privacy_hangs_on_has_a_default():
    for arguments in (
        {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 64},
        {"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "key": KEY},
        {"l2_clip_norm": 1.0, "expected_batch_size": 64, "key": KEY},
        {"noise_multiplier": 1.0, "expected_batch_size": 64, "key": KEY},
    ):
        with pytest.raises(TypeError, match="missing 1 required"):
            privacy.add_gaussian_noise(**arguments)
