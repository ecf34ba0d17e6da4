"""Adaptive clips lock in: after a lasting rise of the norm they clip for ever.

A small network learns the digits by plain SGD. At step 400 the weight of the loss rises
twentyfold for good, so that steps should grow as much. Rules that learn from clipped
norms do not see the new level, and long windows see it late. `rearm_after=50` takes
fifty clipped steps in a row for a new level. Its price: bad batches that last longer
than that are taken for a new level too. Bursts of 10 and of 80 bad batches show it.
"""

from functools import partial
from typing import Any

import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment

RATE, RISE, START, REARM_AFTER = 0.002, 20.0, 400, 50
SHORT, LONG = 10, 80
SCENARIOS = ["rise", f"burst of {SHORT}", f"burst of {LONG}"]
RULES = {
    "ZClip": gn.zclip,
    "AdaGC": gn.adagc,
    "EMA ratio 1.5 (OLMo)": partial(gn.clip_by_ema_norm, 1.5),
    "AutoClip": gn.autoclip,
    "quantile": gn.clip_by_quantile,
    "rolling sigma": gn.clip_by_rolling_sigma,
}


def seed_of(rng: np.random.Generator, steps: int) -> tuple:
    """Returns first parameters, and a stream for each scenario."""
    clean = digits.Stream.clean(rng, steps)
    number = np.arange(steps)
    streams = [
        clean._replace(weights=np.where(number < START, 1.0, RISE)),
        clean.corrupted(rng, at=(number >= START) & (number < START + SHORT)),
        clean.corrupted(rng, at=(number >= START) & (number < START + LONG)),
    ]
    return digits.two_layers(rng), experiment.stack(streams)


def train(clip: Any, scenario: Any, seed: Any) -> dict[str, Any]:
    """Trains one network in one scenario."""
    params, streams = seed
    stream = digits.Stream(*(stream[scenario] for stream in streams))
    tx = optax.chain(clip, optax.sgd(RATE))
    found = digits.train(digits.perceptron, tx, params, stream)
    return {
        "accuracy": found["accuracy"],
        "applied": found["updates"] / RATE,
        "kept": found["updates"] / (RATE * found["norms"]),
    }


def run(quick: bool = False) -> experiment.Outcome:
    """Runs every rule with and without re-arming, in every scenario."""
    steps = START + 160 if quick else 2000
    rules = {"ZClip": RULES["ZClip"]} if quick else RULES
    clips = {("no clip", None): optax.identity()} | {
        (name, after): make(rearm_after=after)
        for name, make in rules.items()
        for after in (None, REARM_AFTER)
    }
    rngs = np.random.default_rng(0).spawn(1 if quick else 3)
    axes = (
        np.arange(len(SCENARIOS)),
        experiment.stack([seed_of(rng, steps) for rng in rngs]),
    )
    found = experiment.side_by_side(
        {
            name: partial(experiment.all_runs, partial(train, clip), axes)
            for name, clip in clips.items()
        }
    )
    rows = [_row(name, after, arm) for (name, after), arm in found.items()]
    return experiment.Outcome(rows, _findings(found), partial(draw, found))


def _row(name: str, after: int | None, arm: dict[str, np.ndarray]) -> experiment.Row:
    row = {
        "rule": name,
        "rearm_after": after or "-",
        "kept at the end of the rise": _kept(arm),
        "steps at less than half": f"{(_since(arm) < 0.5).sum(axis=-1).mean():.0f}",
    }
    for scenario, accuracy in zip(SCENARIOS, arm["accuracy"], strict=True):
        row[f"accuracy, {scenario}"] = accuracy.mean()
    for scenario, norms in zip(SCENARIOS[1:], arm["applied"][1:], strict=True):
        row[f"largest norm let through, {scenario}"] = norms[:, START:].max()
    return row


def _since(arm: dict[str, np.ndarray]) -> np.ndarray:
    """Returns which share of the gradient was kept, from the rise on: [seed, step]."""
    return arm["kept"][0, :, START:]


def _kept(arm: dict[str, np.ndarray]) -> float:
    return _since(arm)[:, -100:].mean()


def _findings(found: dict) -> list[str]:
    pairs = {
        name: (arm, found[name, REARM_AFTER])
        for (name, after), arm in found.items()
        if (name, REARM_AFTER) in found and after is None
    }
    kept = {name: (_kept(a), _kept(b)) for name, (a, b) in pairs.items()}
    clamped = [f"{x} {a:.2f}, {b:.2f}" for x, (a, b) in kept.items() if a < 0.5]
    change = {
        name: (b["accuracy"] - a["accuracy"]).mean(axis=-1)
        for name, (a, b) in pairs.items()
    }
    prices = [
        f"A {scenario}: re-arming changes the accuracy by "
        + ", ".join(f"{by[1 + i]:+.3f} ({name})" for name, by in change.items())
        for i, scenario in enumerate(SCENARIOS[1:])
    ]
    return [
        "Kept of the gradient long after the rise, without and with re-arming, where it"
        f" is less than half without: {'; '.join(clamped) or 'nowhere'}.",
        *(f"{price}." for price in prices),
    ]


def draw(found: dict, figure: Any) -> None:
    """Draws what is kept after the rise, and accuracies with and without re-arming."""
    left, *panels = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    names = list(dict.fromkeys(name for name, _ in list(found)[1:]))
    for color, name in zip(experiment.COLORS, names[:2] + names[3:4], strict=False):
        for after, line in ((None, "-"), (REARM_AFTER, ":")):
            kept = found[name, after]["kept"][0]
            blocks = kept.reshape(len(kept), -1, 20).mean(axis=(0, -1))
            steps = 20 * np.arange(len(blocks)) + 10
            label = name if after is None else "re-arming"
            left.plot(steps, blocks, line, c=color, label=label)
    left.set(xlabel="step", ylabel="share of the gradient kept", ylim=(0, 1.03))
    left.set_title(f"Loss weight x{RISE:g} from step {START}", fontsize="medium")
    rows = -np.arange(len(names))
    for axes, scenario in zip(panels, (0, 2), strict=True):
        for after, style in (
            (None, {"ms": 9, "c": "0.7"}),
            (REARM_AFTER, {"c": "0.1"}),
        ):
            accuracy = [found[x, after]["accuracy"][scenario].mean() for x in names]
            label = "re-arming" if after else "not re-arming"
            axes.plot(accuracy, rows, "o", label=label, **style)
        axes.set(xlabel="accuracy at the end", ylim=(rows[-1] - 0.5, 0.5))
        axes.set_title(f"After the {SCENARIOS[scenario]}", fontsize="medium")
        axes.set_yticks(rows, names if scenario == 0 else [])
    place = {"frameon": False, "fontsize": "small"}
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower left", ncols=3, **place
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower right", **place
    )


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("lock_in", run)
