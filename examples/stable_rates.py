"""Clipping widens the range of stable learning rates where nothing is normalized.

Twelve residual blocks without normalization layers learn the digits of scikit-learn by
SGD with momentum: without a clip, with a clip of the global norm, and with AGC (Brock
et al., 2021) on all layers or on all but the last, as its authors advise.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment

BLOCKS, WIDTH, STABLE = 12, 32, 0.9
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]

UNITS = {"blocks.*": 1, ".*": 0}  # a unit is an output of a kernel; blocks are stacked
BUT_THE_HEAD = {"in": True, "blocks": True, "head": False}


def clips() -> dict[str, optax.GradientTransformation]:
    """Returns what is compared."""
    agc = {limit: gn.adaptive_grad_clip(limit, axis=UNITS) for limit in (0.1, 0.01)}
    return {
        "none": optax.identity(),
        "global norm 1": gn.clip_by_global_norm(1.0),
        "AGC 0.1, all layers": agc[0.1],
        "AGC 0.1, not the head": optax.masked(agc[0.1], BUT_THE_HEAD),
        "AGC 0.01, all layers": agc[0.01],
        "AGC 0.01, not the head": optax.masked(agc[0.01], BUT_THE_HEAD),
    }


def initial_params(rng: np.random.Generator) -> dict[str, Any]:
    """Returns kernels without biases; those of the blocks are stacked."""
    return {
        "in": digits.dense(rng, digits.PIXELS, WIDTH),
        "blocks": {
            "up": digits.dense(rng, BLOCKS, WIDTH, WIDTH),
            "down": 0.5 * digits.dense(rng, BLOCKS, WIDTH, WIDTH),
        },
        "head": digits.dense(rng, WIDTH, digits.CLASSES),
    }


def network(params: Any, images: jax.Array) -> jax.Array:
    """Returns the logits of a residual network of ReLU blocks."""

    def block(x: jax.Array, kernels: dict) -> tuple[jax.Array, None]:
        return x + jax.nn.relu(x @ kernels["up"]) @ kernels["down"], None

    x, _ = jax.lax.scan(block, images @ params["in"], params["blocks"])
    return x @ params["head"]


def train(clip: Any, rate: Any, seed: Any) -> dict[str, jax.Array]:
    """Returns the accuracy that one rate reaches from one seed, and if it diverged."""
    tx = optax.chain(clip, optax.sgd(rate, momentum=0.9))
    found = digits.train(network, tx, *seed)
    diverged = ~jnp.isfinite(found["norms"][-1])
    return {"accuracy": found["accuracy"], "diverged": diverged}


def run(quick: bool = False) -> experiment.Outcome:
    """Runs every clip at every rate."""
    steps, rates = (100, [0.001, 0.03]) if quick else (600, RATES)
    rngs = np.random.default_rng(0).spawn(3)
    seeds = experiment.stack(
        [(initial_params(rng), digits.Stream.clean(rng, steps)) for rng in rngs]
    )
    compared = dict(list(clips().items())[: 2 if quick else None])
    arms = {
        name: partial(
            experiment.all_runs, partial(train, clip), (np.array(rates), seeds)
        )
        for name, clip in compared.items()
    }
    found = experiment.side_by_side(arms)
    accuracy = {name: arm["accuracy"] for name, arm in found.items()}
    rows = [
        {"clip": name}
        | {f"{rate:g}": x for rate, x in zip(rates, reached.mean(axis=-1), strict=True)}
        | {"runs diverged": f"{found[name]['diverged'].sum()} of {reached.size}"}
        for name, reached in accuracy.items()
    ]
    findings = [f"{name}: {span(rates, found)}." for name, found in accuracy.items()]
    findings += [f"Below {STABLE} a rate is too large, or too small for {steps} steps."]
    return experiment.Outcome(rows, findings, partial(draw, rates, accuracy))


def span(rates: list[float], accuracy: np.ndarray) -> str:
    """Says from which rate to which all seeds learn."""
    good = np.array(rates)[(accuracy > STABLE).all(axis=-1)]
    if not len(good):
        return f"no rate brings all seeds above {STABLE}"
    return (
        f"all seeds are above {STABLE} at {len(good)} of {len(rates)} rates, from"
        f" {good[0]:g} to {good[-1]:g}: a factor of {good[-1] / good[0]:.3g}"
    )


def draw(rates: list[float], accuracy: dict[str, np.ndarray], figure: Any) -> None:
    """Draws accuracy against rate: a line through the means, a band for the seeds."""
    styles = {
        "none": ("0.35", "-"),
        "global norm 1": (experiment.COLORS[1], "-"),
        "AGC 0.1, all layers": (experiment.COLORS[0], "-"),
        "AGC 0.1, not the head": (experiment.COLORS[0], "--"),
        "AGC 0.01, all layers": (experiment.COLORS[2], "-"),
        "AGC 0.01, not the head": (experiment.COLORS[2], "--"),
    }
    axes = figure.subplots()
    for name, found in accuracy.items():
        color, line = styles[name]
        axes.plot(
            rates, found.mean(axis=-1), line, c=color, marker="o", ms=4, label=name
        )
        axes.fill_between(
            rates, found.min(axis=-1), found.max(axis=-1), color=color, alpha=0.12, lw=0
        )
    axes.axhline(STABLE, c="0.5", lw=1, ls=":")
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy at the end")
    axes.set(ylim=(0, 1.02))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", frameon=False)


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("stable_rates", run)
