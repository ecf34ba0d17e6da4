"""Clipping survives corrupted batches, and an adaptive limit does as a tuned one does.

Every 100 steps a batch of digits comes in a hundred times too bright and with labels at
random. A small network learns by Adam or by SGD with momentum: without a clip, with a
constant limit tuned on other seeds, and with every adaptive method at its defaults.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment

NEAR = 0.01
TICKS = [0.02, 0.05, 0.1, 0.2, 0.5, 1]
LIMITS = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
OPTIMIZERS = {
    "Adam": lambda weight: optax.adam(3e-3),
    "SGD": lambda weight: optax.sgd(0.05 / weight, momentum=0.9),
}
Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def adaptive_methods() -> dict[str, Wrap]:
    """Returns what each method makes of an optimizer."""
    clips = {
        "AutoClip": gn.autoclip(),
        "ZClip": gn.zclip(),
        "AdaGC": gn.adagc(),
        "EMA ratio 1.5 (OLMo)": gn.clip_by_ema_norm(1.5),
        "AGGC 0.5 to 1.5": gn.aggc(
            {"hidden.*": "hidden", "head.*": "head"}, low=0.5, high=1.5
        ),
        "AdaGN": gn.adagn(),
        "AdaClip": gn.adaclip(),
        "quantile": gn.clip_by_quantile(),
        "rolling sigma": gn.clip_by_rolling_sigma(),
        "second moment (SPAM)": gn.clip_by_second_moment(),
    }
    skip = partial(gn.skip_step, rule=gn.thresholds.rolling_sigma(6.0))
    return {name: partial(optax.chain, clip) for name, clip in clips.items()} | {
        "skip above 6 sigma": skip
    }


def corrupted(steps: int) -> np.ndarray:
    """Returns which steps get a corrupted batch: 100, 200, ..."""
    number = np.arange(steps)
    return (number > 0) & (number % 100 == 0)


def seeds(entropy: int, number: int, steps: int) -> Any:
    """Returns first parameters, and streams in which some batches are corrupted."""
    bad = corrupted(steps)
    rngs = np.random.default_rng(entropy).spawn(number)
    return experiment.stack(
        [
            (
                digits.two_layers(rng),
                digits.Stream.clean(rng, steps).corrupted(rng, at=bad),
            )
            for rng in rngs
        ]
    )


def train(optimizer: Callable, wrap: Wrap, weight: Any, seed: Any) -> dict[str, Any]:
    """Trains with a loss times a weight; the step of SGD stays as it was."""
    params, stream = seed
    stream = stream._replace(weights=weight * stream.weights)
    found = digits.train(digits.perceptron, wrap(optimizer(weight)), params, stream)
    return {name: found[name] for name in ("accuracy", "right")}


@cache
def tuned_limit(optimizer: str, steps: int) -> float:
    """Returns the constant that reaches the best accuracy, on seeds of its own."""

    def constant(limit: Any, seed: Any) -> Any:
        clip = partial(optax.chain, gn.clip_by_global_norm(limit))
        return train(OPTIMIZERS[optimizer], clip, 1.0, seed)["accuracy"]

    found = experiment.all_runs(constant, (np.array(LIMITS), seeds(1, 3, steps)))
    return LIMITS[int(found.mean(axis=-1).argmax())]


def study(weights: list[float], quick: bool) -> dict[str, dict[str, Any]]:
    """Returns for each optimizer and method what came of it: [weight, seed, ...]."""
    steps = 160 if quick else 800
    optimizers = ["SGD"] if quick else list(OPTIMIZERS)
    methods = adaptive_methods()
    if quick:
        methods = {"ZClip": methods["ZClip"]}
    limits = experiment.side_by_side(
        {name: partial(tuned_limit, name, steps) for name in optimizers}
    )
    axes = np.array(weights), seeds(0, 3, steps)
    found = {}
    for name in optimizers:
        constant = partial(optax.chain, gn.clip_by_global_norm(limits[name]))
        wraps = {
            "none": lambda optimizer: optimizer,
            f"constant {limits[name]:g}, tuned": constant,
            **methods,
        }
        arms = {
            method: partial(
                experiment.all_runs, partial(train, OPTIMIZERS[name], wrap), axes
            )
            for method, wrap in wraps.items()
        }
        found[name] = experiment.side_by_side(arms)
    return found


def run(quick: bool = False) -> experiment.Outcome:
    """Runs every method with both optimizers."""
    found = study([1.0], quick)
    rows = [
        {
            "optimizer": optimizer,
            "clip": method,
            "accuracy": arm["accuracy"].mean(),
            "lowest seed": arm["accuracy"].min(),
            "highest": arm["accuracy"].max(),
            "on clean batches, all through": _right_on_clean(arm),
        }
        for optimizer, arms in found.items()
        for method, arm in arms.items()
    ]
    findings = [_against_the_constant(*item) for item in found.items()]
    return experiment.Outcome(rows, findings, partial(draw, found, [""]))


def _right_on_clean(arm: dict[str, Any]) -> float:
    right = arm["right"]
    return right[..., ~corrupted(right.shape[-1])].mean()


def _against_the_constant(optimizer: str, arms: dict[str, Any]) -> str:
    means = {method: arm["accuracy"].mean() for method, arm in arms.items()}
    (_, without), (constant, tuned), *adaptive = means.items()
    near = [method for method, mean in adaptive if abs(mean - tuned) <= NEAR]
    above = [method for method, mean in adaptive if mean > tuned + NEAR]
    below = [f"{method} {mean:.3f}" for method, mean in adaptive if mean < tuned - NEAR]
    return (
        f"{optimizer}: no clip {without:.3f}, {constant} {tuned:.3f}. Of the"
        f" {len(adaptive)} adaptive methods {len(near)} are within {NEAR} of the"
        f" constant, {len(above)} above, {len(below)} below"
        f"{': ' if below else ''}{', '.join(below)}."
    )


def draw(found: dict, labels: list[str], figure: Any) -> None:
    """Draws the errors of each method: a dot for each seed, a bar for their mean."""
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (optimizer, arms) in zip(panels, found.items(), strict=True):
        rows = -np.arange(len(arms), dtype=float)
        for weight, label in enumerate(labels):
            color = experiment.COLORS[weight]
            at = rows - 0.3 * (weight - (len(labels) - 1) / 2)
            errors = [1 - arm["accuracy"][weight] for arm in arms.values()]
            means = np.mean(errors, axis=-1)
            axes.plot(errors, at, "o", c=color, ms=4, alpha=0.5, mew=0)
            axes.plot(means, at, "|", c=color, ms=9, mew=2, label=label)
        axes.set(xlabel="errors on the test set", xscale="log", xlim=(0.015, 1.05))
        axes.set_xticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
        axes.minorticks_off()
        axes.set_yticks(rows, list(arms))
        axes.set_title(optimizer, fontsize="medium")
    if len(labels) > 1:
        bars = panels[0].get_legend_handles_labels()
        figure.legend(*bars, loc="outside lower center", ncols=2, frameon=False)


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("corrupted_batches", run)
