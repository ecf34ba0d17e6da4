"""How near to the truth norms must be: as near as gradients of each example come."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import gradnorm_jax as gn
from gradnorm_jax.norms.ghost import costs, leaves

from .oracle import QUICKLY, Measured, by_vmap, forget_truths, in_float64

IN_FLOAT32 = 5e-6
IN_16_BITS = 1e-2

#: What small models are measured by: what their shapes ask for, or what those of large
#: ones would. Each rule in turn is made to look cheapest, and no leaf is called small.
WAYS = ("by shape", "gram", "product in turn")


@contextlib.contextmanager
def taking(way):
    """Takes what is traced inside a way."""
    if way == "by shape":
        yield
        return

    def cheapest(terms):
        found = chosen(terms)
        return found if found.rule == "outer" else found._replace(rule=way)

    chosen = costs.cheapest
    with (
        mock.patch.object(costs, "cheapest", cheapest),
        mock.patch.object(costs, "SMALL", 0),
        mock.patch.object(leaves, "SMALL", 0),
    ):
        yield


@functools.cache
def measure(loss_fn, way="by shape", **how):
    """Returns a jitted function `(params, batch) -> Measured`."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(params, batch):
        both = gn.value_and_per_example_norms(loss_fn, granularity=gn.per_leaf(), **how)
        whole = gn.per_example_norms(loss_fn, **how)
        with taking(way):
            return Measured(*both(params, batch), whole(params, batch))

    return run


def forget():
    """Lets go of all that was compiled, and of the truths."""
    measure.cache_clear()
    forget_truths()
    jax.clear_caches()


def measured(model, way="by shape", **how):
    """Returns what the library says of a model."""
    run = measure(model.loss_fn, way, **how)
    return jax.device_get(run(model.params, model.batch))


def assert_right(model, got, rtol=None):
    """Asserts that values and norms are those of `vmap(grad)` in float64.

    Where `vmap(grad)` in the dtypes of the model is itself further off than that, as in
    16 bits or where large numbers cancel, it says how far is allowed.
    """
    truth = in_float64(model)
    rtol = rtol or (IN_16_BITS if model.rounds else IN_FLOAT32)
    off = errors(got, truth)
    assert off.leaves.shape == (model.size, len(model.names))
    if not model.rounds and all(np.all(x <= rtol) for x in off):
        return
    plain = errors(by_vmap(model), truth)
    margin = 1.25 if model.rounds else 3.0
    for name in Measured._fields:
        ours, theirs = getattr(off, name), getattr(plain, name)
        allowed = np.maximum(rtol, margin * np.max(theirs, axis=0, initial=0.0))
        where = model.names if name == "leaves" else name
        assert np.all(ours <= allowed), (where, ours, allowed)
        if model.rounds:
            assert _mean_square(ours) <= 1.25 * _mean_square(theirs) + 1e-3**2, name


def errors(got, truth):
    """Returns how far values and norms are off, in proportion.

    To itself, or for a leaf to 2 % of the norm of all leaves if that is more: a key's
    bias has a gradient that is 0 but for rounding, and no digit of that is right.
    """
    typical = np.maximum(np.abs(truth.values), np.mean(np.abs(truth.values)))
    floor = np.maximum(truth.leaves, 0.02 * truth.whole[:, None])
    return Measured(
        _ratio(got.values - truth.values, typical),
        _ratio(got.leaves - truth.leaves, floor),
        _ratio(got.whole - truth.whole, truth.whole),
    )


def _ratio(difference, size):
    """Returns |difference| / size; where the size is 0, only 0 is right."""
    difference = np.abs(np.asarray(difference, np.float64))
    exact = np.where(difference == 0, 0.0, np.inf)
    ratio = np.where(size > 0, difference / np.where(size > 0, size, 1), exact)
    return np.where(np.isnan(ratio), np.inf, ratio)


def _mean_square(x):
    return np.mean(np.square(x)) if x.size else 0.0


def poisoned(batch, example):
    """Returns a batch with every float of one example NaN."""

    def poison(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        x = np.array(x)
        x[example] = np.nan
        return x

    return jax.tree.map(poison, batch)


def assert_alone(model, way="by shape"):
    """Asserts that a NaN in one example changes no bit of the norms of the others.

    But for NaNs that are in their gradients by `vmap(grad)` too: of convolutions that
    `vmap` joins to one of many groups, XLA on a CPU computes all groups times 0.
    """
    run = measure(model.loss_fn, way)
    clean = jax.device_get(run(model.params, model.batch))
    batch = poisoned(model.batch, 1)
    got = jax.device_get(run(model.params, batch))
    others = [i for i in range(model.size) if i != 1]
    same = [
        np.array_equal(x[others], y[others]) for x, y in zip(got, clean, strict=True)
    ]
    if not all(same):
        theirs = by_vmap(model._replace(batch=batch))
        for ours, want, plain in zip(got, clean, theirs, strict=True):
            want = np.where(np.isnan(ours) & np.isnan(plain), np.nan, want)
            np.testing.assert_array_equal(ours[others], want[others])
    assert not np.isfinite(got.whole[1])
