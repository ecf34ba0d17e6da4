"""A limit follows the median of norms in private, and epsilons are right."""

import doctest
import functools
import math
import sys

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from gradnorm_jax import privacy

from .sharding.meshes import mapped, mesh_of, put

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(7)


def avals(fun, *args):
    leaves, structure = jax.tree.flatten(jax.eval_shape(fun, *args))
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def limit_of(q=0.5, z=1.0, *, size=200, key=KEY, **how):
    return privacy.private_quantile(
        q, noise_multiplier=z, expected_batch_size=size, key=key, **how
    )


def stream(random, steps, examples, rate, median=1.0):
    """Norms of all examples, and which are in the batch of each step."""
    norms = median * np.exp(random.normal(size=(steps, examples)))
    mask = random.random((steps, examples)) < rate
    return jnp.asarray(norms, jnp.float32), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=0)
def follow(limit, state, norms, mask):
    def step(state, batch):
        after = limit.update(state, *batch)
        below = batch[0] <= state.l2_clip_norm
        count = lambda x: jnp.sum(x, dtype=jnp.float32)  # noqa: E731
        return after, (count(below & batch[1]), count(batch[1]), after)

    return jax.lax.scan(step, state, (norms, mask))


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_the_share_that_is_not_clipped_stays_at_q_when_the_norms_rise_and_fall(q):
    random = np.random.default_rng(0)
    limit = limit_of(q)
    state = limit.init()
    for median in (1.0, 300.0, 0.02):
        state, _ = follow(limit, state, *stream(random, 800, 1000, 0.2, median))
        settled = stream(random, 300, 1000, 0.2, median)
        state, (below, drawn, _) = follow(limit, state, *settled)
        assert float(below.sum() / drawn.sum()) == pytest.approx(q, abs=0.02)


def test_the_share_it_tells_is_the_true_one_with_noise_and_nothing_else():
    limit = limit_of(rate=0.0, start=1.0, count_stddev=5.0)
    norms, mask = stream(np.random.default_rng(1), 4000, 400, 0.5)
    _, (below, drawn, after) = follow(limit, limit.init(), norms, mask)
    exact = 0.5 + (np.asarray(below) - np.asarray(drawn) / 2) / 200
    errors = (np.asarray(after.unclipped_share) - exact) * 200
    assert abs(errors.mean()) < 4 * 5 / math.sqrt(4000)
    assert errors.std() == pytest.approx(5, rel=0.05)
    assert np.all(after.l2_clip_norm == 1)


@pytest.mark.parametrize("norm", [0.5, 2.0, math.nan, math.inf])
def test_one_example_changes_the_count_by_a_half(norm):
    limit = limit_of(z=0.0, count_stddev=0.0, size=8, start=1.0)
    norms = jnp.array([0.1, 5.0, norm, 0.2])
    with_it = limit.update(limit.init(), norms)
    without = limit.update(limit.init(), norms, jnp.arange(4) != 2)
    change = 8 * float(with_it.unclipped_share - without.unclipped_share)
    assert change == (0.5 if norm <= 1 else -0.5)


def test_without_noise_it_is_the_formula_of_the_paper():
    limit = limit_of(0.7, 0.0, count_stddev=0.0, size=100, rate=0.3, start=2.0)
    norms = stream(np.random.default_rng(2), 50, 100, 1.0)[0]
    state, _ = follow(limit, limit.init(), norms, jnp.ones((50, 100), bool))
    expected = 2.0
    for batch in np.asarray(norms, np.float64):
        expected *= math.exp(-0.3 * (np.mean(batch <= expected) - 0.7))
    assert float(state.l2_clip_norm) == pytest.approx(expected, rel=1e-5)


def test_a_share_outside_of_0_and_1_is_taken_for_one_of_these():
    limit = limit_of(0.25, size=1, count_stddev=1e6, rate=1.0, start=1.0)
    norms = jnp.ones((64, 1))
    _, (_, _, after) = follow(limit, limit.init(), norms, norms > 0)
    assert set(np.asarray(after.unclipped_share).tolist()) == {0.0, 1.0}
    logs = np.diff(np.log(np.asarray(after.l2_clip_norm)))
    np.testing.assert_allclose(np.unique(logs.round(4)), [-0.75, 0.25], atol=1e-3)


@pytest.mark.parametrize(("norm", "edge"), [(0.0, "tiny"), (math.inf, "max")])
def test_the_limit_stays_a_normal_number_and_comes_back(norm, edge):
    limit = limit_of(rate=5.0, size=10, count_stddev=1.0)
    norms = jnp.full((100, 10), norm)
    state, _ = follow(limit, limit.init(), norms, norms >= 0)
    assert state.l2_clip_norm == getattr(np.finfo(np.float32), edge)
    ones = jnp.ones((200, 10))
    state, _ = follow(limit, state, ones, ones > 0)
    assert 1e-3 < state.l2_clip_norm < 1e3


def test_the_two_noises_of_a_step_spend_what_one_would():
    limit = limit_of(z=1.3, count_stddev=0.9)
    both = limit.sum_noise_multiplier**-2 + (2 * 0.9) ** -2
    assert both == pytest.approx(1.3**-2)
    assert limit.noise_multiplier == 1.3
    assert limit_of(z=1.3).sum_noise_multiplier == pytest.approx(
        (1.3**-2 - (2 * 10) ** -2) ** -0.5
    )


def test_the_state_of_the_limit_can_be_saved_and_differs_by_its_key():
    limit, norms = limit_of(), jnp.ones(200)
    first = limit.update(limit.init(), norms)
    saved = flax.serialization.to_bytes(first)
    restored = flax.serialization.from_bytes(limit.init(), saved)
    after = limit.update(first, norms)
    chex.assert_trees_all_equal(limit.update(restored, norms), after)
    other = limit_of(key=jax.random.key(9))
    assert other.update(other.init(), norms).unclipped_share != first.unclipped_share
    assert avals(limit.init) == avals(limit.update, limit.init(), norms)


def test_examples_may_be_spread_over_devices():
    limit = limit_of(size=16, axis_names="d")
    norms = np.linspace(0, 0.3, 16).astype(np.float32)
    run = mapped(lambda x: limit.update(limit.init(), x), mesh_of(), (P("d"),), P())
    alone = limit_of(size=16)
    chex.assert_trees_all_close(
        jax.device_get(run(put(mesh_of(), {"x": norms}, {"x": P("d")})["x"])),
        jax.device_get(alone.update(alone.init(), jnp.asarray(norms))),
        rtol=1e-6,
    )


# What it is worth.


def renyi(z, rate, order):
    """The Renyi divergence of one step, for a whole order (Mironov et al., 2019)."""
    if rate == 1:
        return order / (2 * z**2)
    logs = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / (2 * z**2)
        for k in range(order + 1)
    ]
    return np.logaddexp.reduce(logs) / (order - 1)


def epsilon_by_hand(z, rate, steps, delta, *, classic=False):
    """The least epsilon over whole orders; as in 2016, or as it is done today."""
    found = []
    for order in range(2, 200):
        value = steps * renyi(z, rate, order)
        if classic:
            value -= math.log(delta) / (order - 1)
        else:
            value += math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        found.append(value)
    return min(found)


MNIST = 256 / 60000
# Multiplier, rate, steps, and the epsilon that was published for delta = 1e-5: the
# first two by Abadi et al. (2016), then the tutorial of TensorFlow Privacy.
PUBLISHED = {
    "100 epochs": (4.0, 0.01, 10000, 1.26),
    "400 epochs": (4.0, 0.01, 40000, 2.55),
    "tutorial, 60 epochs": (1.12, MNIST, 60 * 60000 // 256, 2.92),
    "tutorial, 30 epochs": (0.6, MNIST, 30 * 60000 // 256, 9.74),
    "tutorial, 10 epochs": (1.2, MNIST, 10 * 60000 // 256, 1.20),
}


def asked(z, rate, steps, delta=1e-5, accountant="pld"):
    return privacy.epsilon(
        noise_multiplier=z,
        sampling_rate=rate,
        steps=steps,
        delta=delta,
        accountant=accountant,
    )


def spent(*args, **how):
    pytest.importorskip("dp_accounting")
    return asked(*args, **how)


@pytest.mark.parametrize("case", PUBLISHED)
def test_epsilon_agrees_with_what_was_published_and_with_a_formula(case):
    z, rate, steps, published = PUBLISHED[case]
    then = epsilon_by_hand(z, rate, steps, 1e-5, classic=True)
    assert then == pytest.approx(published, rel=0.015)
    by_orders = spent(z, rate, steps, accountant="rdp")
    assert by_orders == pytest.approx(epsilon_by_hand(z, rate, steps, 1e-5), rel=0.01)
    tight = spent(z, rate, steps)
    assert 0.6 * published < tight < by_orders < published


@pytest.mark.parametrize(("z", "steps"), [(5.0, 10), (20.0, 100), (1.0, 1)])
def test_without_sampling_epsilon_is_the_closed_form(z, steps):
    by_orders = spent(z, 1.0, steps, accountant="rdp")
    assert by_orders == pytest.approx(epsilon_by_hand(z, 1, steps, 1e-5), rel=0.02)
    tight, mu = spent(z, 1.0, steps), math.sqrt(steps) / z
    normal = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    delta = normal(mu / 2 - tight / mu)
    delta -= math.exp(tight) * normal(-mu / 2 - tight / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_more_steps_a_higher_rate_and_less_noise_spend_more():
    by_orders = functools.partial(spent, accountant="rdp")
    least = by_orders(1.0, 0.01, 100)
    assert least < by_orders(1.0, 0.01, 200)
    assert least < by_orders(1.0, 0.02, 100)
    assert least < by_orders(0.8, 0.01, 100)
    assert least < by_orders(1.0, 0.01, 100, delta=1e-6)
    assert spent(0.0, 0.01, 100) == math.inf


@pytest.mark.parametrize("target", [0.5, 4.0])
def test_the_noise_for_an_epsilon_has_that_epsilon_or_a_smaller_one(target):
    pytest.importorskip("dp_accounting")
    how = {"sampling_rate": 0.02, "steps": 500, "delta": 1e-5}
    z = privacy.noise_multiplier_for(target, **how, accountant="rdp")
    found = privacy.epsilon(noise_multiplier=z, **how, accountant="rdp")
    assert target * 0.998 < found <= target


def test_the_examples_of_the_accountants_are_true():
    pytest.importorskip("dp_accounting")
    for function in (privacy.epsilon, privacy.noise_multiplier_for):
        text = function.__doc__.replace("# doctest: +SKIP", "")
        names = {function.__name__: function}
        test = doctest.DocTestParser().get_doctest(text, names, "epsilon", None, 0)
        assert len(test.examples) == 2
        assert doctest.DocTestRunner().run(test).failed == 0


def test_what_is_not_installed_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    how = {"sampling_rate": 0.1, "steps": 1, "delta": 1e-5}
    with pytest.raises(ImportError, match=r"epsilon.*gradnorm-jax\[privacy\]"):
        privacy.epsilon(noise_multiplier=1.0, **how)
    with pytest.raises(ImportError, match=r"noise_multiplier_for.*dp-accounting"):
        privacy.noise_multiplier_for(1.0, **how)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: limit_of(1.5), ValueError, "quantile.q=.*got 1.5"),
        (lambda: limit_of(z=-1.0), ValueError, "noise_multiplier=.*got -1.0"),
        (lambda: limit_of(size=10), ValueError, "below twice .*got 1.0 and 0.5"),
        (lambda: limit_of(z=jnp.float32(1), size=10), ValueError, "below twice .*got"),
        (lambda: limit_of(count_stddev=-1.0), ValueError, "count_stddev=.*got -1.0"),
        (lambda: limit_of(rate=-1.0), ValueError, "rate=.*got -1.0"),
        (lambda: limit_of(start=0.0), ValueError, "start=.*got 0.0"),
        (lambda: limit_of(key=None), TypeError, "private_quantile.key=.*got None"),
        (lambda: asked(-1.0, 0.1, 1), ValueError, "noise_multiplier=.*got -1.0"),
        (lambda: asked(1.0, 0.0, 1), ValueError, "sampling_rate=.*got 0.0"),
        (lambda: asked(1.0, 1.5, 1), ValueError, "sampling_rate=.*got 1.5"),
        (lambda: asked(1.0, 0.1, 1, delta=1), ValueError, "delta=.*got 1.*well below"),
        (lambda: asked(1.0, 0.1, 0), ValueError, "steps=.*at least 1, got 0"),
        (lambda: asked(1.0, 0.1, 1.5), TypeError, "steps=.*whole number.*got 1.5"),
        (lambda: asked(1.0, 0.1, 1, accountant="x"), ValueError, "accountant=.*'x'"),
        (
            lambda: privacy.noise_multiplier_for(
                0.0, sampling_rate=0.1, steps=1, delta=1e-5
            ),
            ValueError,
            "noise_multiplier_for.epsilon=.*above 0.*got 0.0",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
