"""An AdamW step with each rule with memory, against one with a constant limit."""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, trees
from benchmarks.comparing import against_the_first
from benchmarks.options import Options
from benchmarks.rows import Limits, Row
from benchmarks.training import Step

Cases = dict[str, tuple[Any, Any]]

QUICK = ("percentile 1000",)


def rows(options: Options) -> Iterator[Row]:
    """Compares rules of one granularity with a constant limit of the same."""
    thresholds, shrink = gn.thresholds, gn.shrink
    grads = trees.fill(options.shapes("wide"), jnp.float32)
    for settings, cases, own_limits in _groups():
        if options.quick:
            cases = {name: case for name, case in cases.items() if name in QUICK}
        if not cases:
            continue
        fixed = {"constant": (thresholds.constant(1.0), shrink.rescale)}
        arms = {
            name: Step(
                optax.chain(
                    gn.clip_by_norm(rule, shrink=own, **settings), optax.adamw(1e-3)
                ),
                grads,
            ).arm()
            for name, (rule, own) in (fixed | cases).items()
        }
        yield from against_the_first(
            options,
            Row("rules", "", "wide", "float32", ""),
            arms,
            limits=own_limits,
            seconds=len(arms) * options.seconds / (1 if options.whole else 2),
        )


def _groups() -> Iterator[tuple[dict[str, Any], Cases, Limits]]:
    """Returns the rules that share a granularity and a norm, and their limits."""
    thresholds, shrink = gn.thresholds, gn.shrink
    by_leaf = {"granularity": gn.per_leaf()}
    percentile = functools.partial(thresholds.percentile, 10.0, window=1000)
    warm = {"warmup_steps": 100, "warmup_limit": 1.0}
    yield (
        by_leaf,
        {
            "constant again": (thresholds.constant(2.0), shrink.rescale),
            "percentile 1000": (percentile(), shrink.rescale),
            "percentile, rearm": (percentile(rearm_after=50), shrink.rescale),
            "z_score": (thresholds.z_score(2.5), shrink.reciprocal),
            "ema_relative": (thresholds.ema_relative(1.05, **warm), shrink.rescale),
            "ema_band": (thresholds.ema_band(0.5, 2.0), shrink.band),
            "quantile": (thresholds.quantile(0.5), shrink.rescale),
            "rolling_sigma 128": (thresholds.rolling_sigma(3.0), shrink.rescale),
            "moment_ratio": (thresholds.moment_ratio(), shrink.normalize),
            "second_moment": (thresholds.second_moment(5000.0), shrink.rescale),
        },
        limits.RULES,
    )
    yield (
        by_leaf | {"norm": gn.norms.linf},
        {
            "max_ema": (thresholds.max_ema(), shrink.rescale),
            "max_ema, spikes": (thresholds.max_ema(), shrink.spikes),
        },
        limits.RULES,
    )
    yield (
        {"granularity": gn.per_unit(axes=()), "norm": gn.norms.linf},
        {"second_moment, entry": (thresholds.second_moment(5e3), shrink.rescale)},
        Limits(),
    )
