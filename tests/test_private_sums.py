"""One example moves a clipped sum by no more than the limit, whatever it holds."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax import privacy

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(7)
LIMIT, MULTIPLIER, SIZE = 2.0, 1.5, 64


def noise(limit=LIMIT, multiplier=MULTIPLIER, *, key=KEY, size=SIZE, **how):
    return privacy.add_gaussian_noise(
        limit, multiplier, expected_batch_size=size, key=key, **how
    )


def aggregate(limit=LIMIT, multiplier=MULTIPLIER, *, key=KEY, size=SIZE):
    return privacy.differentially_private_aggregate(
        limit, multiplier, key, expected_batch_size=size
    )


def updates_of(tx, *steps, **extra):
    state = tx.init(steps[0])
    found = []
    for grads in steps:
        updates, state = tx.update(grads, state, **extra)
        found.append(updates)
    return found, state


def examples(seed, size=24):
    random = np.random.default_rng(seed)
    scales = 10 ** random.uniform(-3, 6, size)
    return {
        name: jnp.asarray(
            random.normal(size=(size, *shape)) * scales.reshape(-1, *[1] * len(shape)),
            jnp.float32,
        )
        for name, shape in {"w": (5, 3), "b": (7,), "c": ()}.items()
    }


def distance(one, other):
    """The norm of a difference, in float64."""
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    gaps = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs]
    return math.sqrt(sum(np.sum(gap**2) for gap in gaps))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1e-3, 1.0, 50.0])
def test_one_example_more_moves_the_sum_by_at_most_the_limit(seed, limit):
    batch = examples(seed)
    total, _ = gn.per_example_global_norm_clip(batch, limit)
    for left_out in range(0, 24, 5):
        mask = jnp.arange(24) != left_out
        rest, _ = gn.per_example_global_norm_clip(batch, limit, example_mask=mask)
        assert distance(total, rest) <= limit * (1 + 1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3e38])
def test_what_one_example_holds_moves_the_sum_by_at_most_the_limit(bad):
    batch = examples(0)
    poisoned = batch | {"w": batch["w"].at[3].set(bad)}
    mask = jnp.arange(24) != 3
    rest, _ = gn.per_example_global_norm_clip(batch, 2.0, example_mask=mask)
    total, _ = gn.per_example_global_norm_clip(poisoned, 2.0)
    assert distance(total, rest) <= 2.0 * (1 + 1e-5)
    if not math.isfinite(bad):
        chex.assert_trees_all_equal(total, rest)


def loss_fn(params, example):
    inputs, target = example
    output = jnp.tanh(inputs @ params["w"]) @ params["v"] + params["b"]
    return 0.5 * jnp.sum(jnp.square(output - target))


@functools.cache
def clipped_sum(implementation):
    clipped = gn.clipped_grad(loss_fn, 0.5, implementation=implementation)
    return jax.jit(lambda *args: clipped(*args[:2], example_mask=args[2]).grads)


@pytest.mark.parametrize("implementation", ["one_pass", "two_pass", "vmap"])
def test_one_example_more_moves_the_sum_of_clipped_gradients_by_at_most_the_limit(
    implementation,
):
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": normal(6, 5), "v": normal(5, 2), "b": normal(2)}
    scale = jnp.logspace(-2, 6, 24, dtype=jnp.float32)[:, None]
    batch = (normal(24, 6), scale * normal(24, 2))
    compute, everyone = clipped_sum(implementation), jnp.ones(24, bool)
    total = compute(params, batch, everyone)
    moved = []
    for left_out in range(24):
        rest = compute(params, batch, everyone.at[left_out].set(False))
        moved.append(distance(total, rest))
    assert 0.5 * (1 - 1e-4) < max(moved) <= 0.5 * (1 + 1e-5)


def test_padding_adds_nothing_and_does_not_count_whatever_it_holds():
    batch = examples(1)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:3] * jnp.nan]), batch)
    mask = jnp.arange(27) < 24
    found = gn.per_example_global_norm_clip(padded, 1.0, example_mask=mask)
    expected = gn.per_example_global_norm_clip(batch, 1.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    _, counted = gn.per_example_global_norm_clip(padded, 1.0)
    assert counted == expected[1] + 3


def test_without_noise_the_aggregate_is_that_of_optax():
    batch = examples(2)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.contrib.differentially_private_aggregate(1.0, 0.0, KEY)
        theirs, _ = tx.update(batch, tx.init(batch))
    [ours], _ = updates_of(aggregate(1.0, 0.0, size=24), batch)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_aggregate_is_the_clip_and_then_the_noise():
    batch, mask = examples(3), jnp.arange(24) % 3 > 0
    [found], state = updates_of(aggregate(), batch, example_mask=mask)
    total, _ = gn.per_example_global_norm_clip(batch, LIMIT, example_mask=mask)
    [expected], after = updates_of(noise(), total)
    chex.assert_trees_all_equal((found, state), (expected, after))


def test_the_aggregate_keeps_dtypes_and_drops_what_is_not_finite():
    batch = jax.tree.map(lambda x: x[:4].astype(jnp.bfloat16), examples(4))
    bad = batch | {"b": batch["b"].at[1].set(jnp.nan)}
    tx = aggregate()
    params = jax.tree.map(lambda x: x[0], batch)
    step = jax.jit(tx.update)
    updates, state = step(bad, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite(updates)
    mask = jnp.arange(4) != 1
    without, after = step(batch, tx.init(params), params, example_mask=mask)
    chex.assert_trees_all_equal((updates, state), (without, after))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: aggregate(-1.0), ValueError, r"aggregate\(l2_norm_clip=.*got -1.0"),
        (
            lambda: aggregate(lambda step: 1.0),
            TypeError,
            "l2_norm_clip=.*must be a number.*`add_gaussian_noise` takes",
        ),
        (lambda: aggregate(key=3), TypeError, r"aggregate\(key=.*got 3\."),
        (
            lambda: aggregate().update(examples(0), ()),
            TypeError,
            "differentially_private_aggregate.*NoiseState.*got a tuple",
        ),
        (
            lambda: gn.per_example_global_norm_clip(
                examples(0), 1.0, example_mask=jnp.ones(24)
            ),
            ValueError,
            r"example_mask=.*of shape \(24,\), got float32 of shape \(24,\)",
        ),
        (
            lambda: updates_of(aggregate(), examples(0), example_mask=[True] * 3),
            ValueError,
            r"example_mask=.*of shape \(24,\), got bool of shape \(3,\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
