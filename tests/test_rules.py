"""Every rule that remembers agrees with its formula, whatever the norms do."""

import copy
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

from .references import parts, rules, streams
from .references.norms import wide

pytestmark = pytest.mark.usefixtures("strict")

# A rule of `gn.thresholds` and of the oracles, its arguments, and a shrink.
CLIPPED = {"feed": "clipped", "warmup_steps": 5, "warmup_limit": 1.0}
RAW = {"feed": "raw", "warmup_steps": 20, "warmup_limit": 1.1}
CASES = {
    "percentile": ("percentile", (10,), {}, "rescale"),
    "percentile, short": ("percentile", (90,), {"window": 50}, "rescale"),
    "percentile, clipped": ("percentile", (30.5,), {"window": 7} | CLIPPED, "smooth"),
    "z_score": ("z_score", (2.5,), {}, "reciprocal"),
    "z_score, center": ("z_score", (2.5,), {}, "center"),
    "z_score, raw": ("z_score", (1.5,), {"decay": 0.9} | RAW, "rescale"),
    "ema_relative": ("ema_relative", (1.5,), {"decay": 0.95}, "rescale"),
    "ema_relative, clipped": ("ema_relative", (1.05,), CLIPPED, "rescale"),
    "ema_relative, raw": ("ema_relative", (1.2,), RAW, "smooth"),
    "ema_band": ("ema_band", (0.9, 1.1), {}, "band"),
    "ema_band, clipped": ("ema_band", (0.5, 1.2), {"decay": 0.9} | CLIPPED, "band"),
    "quantile": ("quantile", (0.9,), {}, "rescale"),
    "quantile, slow": ("quantile", (0.5,), {"rate": 0.05, "start": 10.0}, "normalize"),
    "rolling_sigma": ("rolling_sigma", (6.0,), {}, "zero"),
    "rolling_sigma, short": ("rolling_sigma", (2.0,), {"window": 3}, "rescale"),
    "rolling_sigma, clipped": (
        "rolling_sigma",
        (1.5,),
        {"window": 16} | CLIPPED,
        "rescale",
    ),
    "max_ema": ("max_ema", (), {}, "rescale"),
    "max_ema, clipped": ("max_ema", (1.2,), {"decay": 0.9} | CLIPPED, "rescale"),
    "moment_ratio": ("moment_ratio", (), {}, "normalize"),
    "second_moment": ("second_moment", (5000.0,), {}, "rescale"),
    "second_moment, raw": ("second_moment", (4.0,), {"decay": 0.9} | RAW, "rescale"),
    "second_moment, clipped": ("second_moment", (2.0,), CLIPPED, "rescale"),
}
# Locked in, its window holds nothing but its own last limits, and their rounding.
LOOSE = {"rolling_sigma, clipped": 2e-5}
# How many numbers a rule says that it remembers of a part.
REMEMBERS = {
    "percentile": 2 * 1000 + 2,
    "z_score": 2,
    "ema_relative": 1,
    "ema_band": 1,
    "quantile": 1,
    "rolling_sigma": 128,
    "max_ema": 1,
    "moment_ratio": 2,
    "second_moment": 1,
}
# Whose limits do not have the unit of the norms.
ABSOLUTE = {case for case, (_, _, named, _) in CASES.items() if "warmup_limit" in named}
ABSOLUTE |= {"quantile", "quantile, slow"}
STREAMS = np.stack(list(streams.ALL.values()))

all_cases = pytest.mark.parametrize("case", CASES)
each_rule = pytest.mark.parametrize("case", REMEMBERS)


def rules_of(case, **changed):
    """Returns the rule, its oracle, and the shrink."""
    kind, arguments, named, shrink = CASES[case]
    names = inspect.signature(getattr(gn.thresholds, kind)).parameters
    named = dict(zip(names, arguments, strict=False)) | named
    rule = getattr(gn.thresholds, kind)(**named | changed)
    return rule, getattr(rules, kind)(**named), shrink


def clip_of(case, *, changed=None, **settings):
    rule, _, shrink = rules_of(case, **changed or {})
    return gn.clip_by_norm(rule, shrink=getattr(gn.shrink, shrink), **settings)


def oracle(case, norms, **settings):
    _, rule, shrink = rules_of(case)
    return rules.run(rule, norms, shrink, **settings)


@functools.cache
def leader():
    return streams.leader({case: clip_of(case) for case in CASES})


@functools.cache
def lead(*, power=0, step=0, bad=()):
    """Leads each clip along the streams, scaled, and with norms put in at a step."""
    norms = np.insert(np.ldexp(STREAMS, power), [step] * len(bad), bad, axis=1)
    return jax.tree.map(np.asarray, leader()(norms[:, : streams.STEPS, None]))


def assert_close(actual, expected, rtol=1e-5):
    actual = np.asarray(actual)
    off = ~np.isclose(actual, expected, rtol=rtol, atol=0, equal_nan=True)
    assert not np.any(off), (np.flatnonzero(off), actual[off], expected[off])


def assert_agree(clipped, limits, expected, rtol=1e-5):
    """Compares with what an oracle expects: NaN where a step leaves no trace."""
    expected_limits, after = expected
    limits = np.where(np.isnan(expected_limits), np.nan, limits)
    assert_close(limits, expected_limits, min(rtol, 2e-5))
    clipped = np.asarray(clipped, np.float64)
    assert_close(np.where(np.isinf(clipped), np.nan, clipped), after, rtol)


@all_cases
def test_a_rule_is_its_formula_whatever_the_norms_do(case):
    clipped, limits = lead()[case]
    for k, norms in enumerate(STREAMS):
        rtol = LOOSE.get(case, 1e-5)
        assert_agree(clipped[k, :, 0], limits[k], oracle(case, norms), rtol)


def test_a_rule_is_its_formula_step_by_step():
    clips = {case: clip_of(case) for case in REMEMBERS}

    @jax.jit
    def update(grads, states):
        led = {case: clip.update(grads, states[case]) for case, clip in clips.items()}
        return {case: state for case, (_, state) in led.items()}

    norms = streams.ALL["spikes"][:130]
    states = {case: clip.init(norms[:1]) for case, clip in clips.items()}
    limits = []
    for norm in norms:
        states = update(norm[None], states)
        limits.append({case: float(s.metrics.limits) for case, s in states.items()})
    for case in clips:
        assert_close([at[case] for at in limits], oracle(case, norms)[0])


@all_cases
@pytest.mark.parametrize("bad", [(np.nan,), (np.inf,), (0.0,), (0.0,) * 300])
def test_what_is_not_taken_in_leaves_no_trace(case, bad):
    for step in (0, 3, 90, 450):
        kept = streams.STEPS - step - len(bad)
        marred = lead(step=step, bad=bad)
        for now, before in zip(marred[case], lead()[case], strict=True):
            np.testing.assert_array_equal(now[:, -kept:], before[:, step : step + kept])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ABSOLUTE])
@pytest.mark.parametrize("power", [-20, 20])
def test_a_relative_limit_has_the_unit_of_the_norms(case, power):
    (_, limits), (_, scaled) = lead()[case], lead(power=power)[case]
    unit = 0 if case == "moment_ratio" else power
    np.testing.assert_allclose(scaled, np.ldexp(limits, unit), rtol=1e-6)


@each_rule
def test_a_rule_remembers_what_it_says_of_each_part(case):
    rule, _, _ = rules_of(case)
    for shape in ((), (3,)):
        memory = jax.eval_shape(rule.init, jnp.zeros(shape))
        numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(memory))
        seen = math.prod(shape)
        assert numbers == (REMEMBERS[case] + 1) * seen


BY_LEAF = {
    "a": streams.ALL["zeros"],
    "b": streams.ALL["nonfinite"],
    "c": streams.ALL["bursts"],
    "d": streams.ALL["nonfinite"][::-1],
}
IN_PARTS = [(case, "drop") for case in CASES if "clipped" in case or "raw" in case]
IN_PARTS += [(case, "drop") for case in ("quantile", "moment_ratio")]
IN_PARTS += [("z_score, raw", "propagate"), ("rolling_sigma, clipped", "zero")]


@functools.cache
def lead_leaves():
    clips = {
        (case, policy): clip_of(case, granularity=gn.per_leaf(), nonfinite=policy)
        for case, policy in IN_PARTS
    }
    grads = {name: norms[None, :, None] for name, norms in BY_LEAF.items()}
    return jax.tree.map(np.asarray, streams.leader(clips)(grads))


@pytest.mark.parametrize(("case", "policy"), IN_PARTS)
def test_parts_learn_alone_only_where_bad_ones_are_dropped(case, policy):
    norms = np.stack(list(BY_LEAF.values()))
    finite = np.isfinite(norms)
    taken_in = (
        finite if policy == "drop" else np.broadcast_to(finite.all(0), finite.shape)
    )
    totals = np.linalg.norm(np.where(finite, norms, 0), axis=0)
    clipped, limits = lead_leaves()[case, policy]
    for k, own in enumerate(clipped.values()):
        expected = oracle(case, np.where(taken_in[k], norms[k], np.nan), totals=totals)
        own = np.where(taken_in[k], own[0, :, 0], np.nan)
        assert_agree(own, limits[0, :, k], expected)


def test_bfloat16_gradients_are_learned_from_in_float32():
    clips = {case: clip_of(case) for case in ("percentile, short", "z_score")}
    half = STREAMS.astype(jnp.bfloat16)
    for case, (clipped, limits) in streams.leader(clips)(half[:, :, None]).items():
        assert (clipped.dtype, limits.dtype) == (jnp.bfloat16, np.float32)
        for k, norms in enumerate(half.astype(np.float32)):
            assert_agree(clipped[k, :, 0], limits[k], oracle(case, norms), rtol=2**-8)


def test_the_numbers_of_a_rule_may_follow_the_step():
    follow = [
        ("percentile, short", "q", 60.0),
        ("z_score", "z", 1.5),
        ("ema_relative", "factor", 1.1),
        ("ema_band", "low", 0.7),
        ("ema_band", "high", 1.1),
        ("quantile", "q", 0.6),
        ("quantile", "rate", 0.1),
        ("rolling_sigma", "k", 2.0),
        ("max_ema", "factor", 1.0),
        ("second_moment", "factor", 3.0),
    ]
    growth = np.linspace(1, 1.5, streams.STEPS, dtype=np.float32)
    schedule = lambda start: lambda step: start * jnp.asarray(growth)[step]  # noqa: E731
    clips = {
        (case, name): clip_of(case, changed={name: schedule(start)})
        for case, name, start in follow
    }
    norms = np.stack([streams.ALL[event] for event in ("zeros", "rise_3", "spikes")])
    led = streams.leader(clips)(norms[:, :, None])
    for case, name, start in follow:
        clipped, limits = led[case, name]
        schedules = {name: (start * growth).tolist().__getitem__}
        for k, own in enumerate(norms):
            expected = oracle(case, own, schedules=schedules)
            assert_agree(clipped[k, :, 0], limits[k], expected)


# A tree whose leaves have the norms of a stream each, in fixed directions.
SHAPES = {"a": (2,), "b": (3,), "s": (2, 2)}
EVENTS = {"a": "spikes", "b": "rise_3", "s": "zeros"}
TREE = {
    name: np.multiply.outer(
        streams.ALL[EVENTS[name]],
        np.random.default_rng(k).normal(size=shape) + 0.1,
    ).astype(np.float32)
    for k, (name, shape) in enumerate(SHAPES.items())
}
WHOLE = parts.whole_tree(SHAPES)
BY_NAME = parts.per_leaf(SHAPES)
METHODS = {
    "autoclip": (gn.autoclip(), WHOLE, rules.percentile(10)),
    "autoclip by leaf": (
        gn.autoclip(25, window=20, granularity=gn.per_leaf()),
        BY_NAME,
        rules.percentile(25, window=20),
    ),
    "zclip": (gn.zclip(), WHOLE, rules.z_score(2.5), "reciprocal"),
    "zclip to the mean": (
        gn.zclip(2.0, mode="mean", decay=0.9),
        WHOLE,
        rules.z_score(2.0, decay=0.9),
        "center",
    ),
    "zclip to sigma": (
        gn.zclip(mode="sigma", warmup_steps=9, warmup_limit=3.0),
        WHOLE,
        rules.z_score(2.5, warmup_steps=9, warmup_limit=3.0),
    ),
    "adagc": (
        gn.adagc(stacked_axes={"s": 0}),
        parts.per_leaf(SHAPES, "s"),
        rules.ema_relative(1.05, warmup_steps=100, warmup_limit=1.0),
    ),
    "clip_by_ema_norm": (
        gn.clip_by_ema_norm(1.2),
        BY_NAME,
        rules.ema_relative(1.2, decay=0.95),
    ),
    "aggc": (
        gn.aggc({"a|s": "x", "b": "y"}, low=0.9, high=1.1),
        parts.per_group(SHAPES, {"a": "x", "s": "x", "b": "y"}),
        rules.ema_band(0.9, 1.1),
        "band",
    ),
    "adagn": (gn.adagn(), BY_NAME, rules.moment_ratio(), "normalize"),
    "clip_by_quantile": (gn.clip_by_quantile(), WHOLE, rules.quantile(0.5)),
    "clip_by_rolling_sigma": (
        gn.clip_by_rolling_sigma(),
        WHOLE,
        rules.rolling_sigma(3.0),
    ),
    "clip_by_second_moment": (
        gn.clip_by_second_moment(20.0),
        parts.per_unit(SHAPES, dict.fromkeys(SHAPES, ())),
        rules.second_moment(20.0, warmup_steps=20),
    ),
    "smooth_clip": (gn.smooth_clip(1.0), WHOLE, rules.constant(1.0), "smooth"),
    "normalize_by_norm": (
        gn.normalize_by_norm(2.0),
        WHOLE,
        rules.constant(2.0),
        "normalize",
    ),
}


def along(part):
    """Returns where a part lies in leaves that have the steps as their first axis."""
    return [
        (name, (slice(None), *(index if isinstance(index, tuple) else (index,))))
        for name, index in part
    ]


def norms_along(part, order=2):
    laid_out = [wide(TREE[n])[i].reshape(streams.STEPS, -1) for n, i in along(part)]
    return np.linalg.norm(np.concatenate(laid_out, axis=1), order, axis=1)


@functools.cache
def lead_methods():
    clips = {name: clip for name, (clip, *_) in METHODS.items()}
    clips["adaclip"] = gn.adaclip(stacked_axes={"s": 0})
    led = streams.leader(clips)({name: x[None] for name, x in TREE.items()})
    return {name: jax.tree.map(lambda x: x[0], out) for name, (out, _) in led.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_rule_on_its_parts(method):
    _, members, rule, *shrink = METHODS[method]
    clipped = lead_methods()[method]
    norms = np.stack([norms_along(part) for part in members])
    totals = np.linalg.norm(norms, axis=0)
    for part, own in zip(members, norms, strict=True):
        _, after = rules.run(copy.deepcopy(rule), own, *shrink, totals=totals)
        scales = np.divide(after, own, out=np.ones_like(own), where=own > 0)
        for name, index in along(part):
            before, actual = TREE[name][index], np.asarray(clipped[name])[index]
            for entry in np.ndindex(before.shape[1:]):
                entries = (slice(None), *entry)
                assert_close(actual[entries], before[entries] * scales)


def test_adaclip_scales_the_entries_above_the_mean_of_the_largest_ones():
    clipped = lead_methods()["adaclip"]
    for part in parts.per_leaf(SHAPES, "s"):
        largest = norms_along(part, np.inf)
        limits, _ = rules.run(rules.max_ema(), largest)
        ((name, index),) = along(part)
        scales = np.divide(limits, largest, out=np.ones_like(limits), where=largest > 0)
        actual = np.asarray(clipped[name])[index]
        for k in range(2):
            entries = TREE[name][index][:, k]
            spiky = np.abs(entries) > limits
            assert_close(actual[:, k], entries * np.where(spiky, scales, 1))


def test_a_tensor_without_gradients_for_a_while_is_not_frozen():
    grads = {name: streams.ALL["calm"][None, :, None].copy() for name in "ab"}
    grads["b"][0, [3, *range(200, 500)]] = 0  # once in the warm-up, then an idle expert
    methods = [gn.adagc(), gn.clip_by_ema_norm(1.1), gn.adagn(), gn.adaclip()]
    for clipped, _ in streams.leader(dict(enumerate(methods)))(grads).values():
        for steps in (slice(4, 200), slice(500, None)):
            kept = [np.sum(clipped[name][0, steps]) for name in "ab"]
            assert kept[1] > 0.95 * kept[0] > 0
