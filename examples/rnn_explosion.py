"""Clipping stops the explosion of gradients in a recurrent network.

The temporal-order task of Pascanu et al. (2013): which of two symbols came early, and
which came later, in a sequence of 50? A tanh network whose recurrent matrix has
spectral radius 1 learns it by plain SGD, with and without a clip of the global norm.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from examples import experiment

UNITS, SYMBOLS, CLASSES, BATCH = 50, 6, 4, 20
CHANCE, LEARNED = 1 / CLASSES, 0.5


def initial_params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns small weights around a recurrent matrix of spectral radius 1."""
    recurrent = rng.normal(size=(UNITS, UNITS))
    radius = np.abs(np.linalg.eigvals(recurrent)).max()
    return {
        "in": rng.normal(scale=0.1, size=(SYMBOLS, UNITS)),
        "recurrent": recurrent / radius,
        "recurrent_bias": np.zeros(UNITS),
        "out": rng.normal(scale=0.1, size=(UNITS, CLASSES)),
        "out_bias": np.zeros(CLASSES),
    }


def sequences(rng: np.random.Generator, shape: tuple, length: int) -> tuple:
    """Returns rows of symbols, and which of four orders each row holds: small integers.

    Symbols 0 and 1 tell: one in the second tenth of a row, one in the fifth. The others
    are noise.
    """
    symbols = rng.integers(2, SYMBOLS, (*shape, length), np.int8)
    told = rng.integers(0, 2, (*shape, 2), np.int8)
    early = rng.integers(length // 10, length // 5 + 1, shape)
    late = rng.integers(2 * length // 5, length // 2 + 1, shape)
    for place, told_there in ((early, told[..., :1]), (late, told[..., 1:])):
        np.put_along_axis(symbols, place[..., None], told_there, axis=-1)
    return symbols, 2 * told[..., 0] + told[..., 1]


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple:
    """Returns the loss and the accuracy."""
    symbols, labels = batch
    inputs = jax.nn.one_hot(symbols.T, SYMBOLS)
    drive = inputs @ params["in"] + params["recurrent_bias"]

    def cell(hidden: jax.Array, drive: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(hidden @ params["recurrent"] + drive), None

    hidden, _ = jax.lax.scan(cell, jnp.zeros_like(drive[0]), drive, unroll=len(drive))
    logits = hidden @ params["out"] + params["out_bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), jnp.mean(jnp.argmax(logits, -1) == labels)


def train(max_norm: Any, rate: Any, seed: Any) -> dict[str, jax.Array]:
    """Trains one network; `seed` is its first parameters, its batches and its test."""
    params, batches, test = seed
    tx = optax.chain(gn.clip_by_global_norm(max_norm), optax.sgd(rate))

    def step(carry: tuple, batch: Any) -> tuple[tuple, jax.Array]:
        params, state = carry
        grads = jax.grad(loss_fn, has_aux=True)(params, batch)[0]
        updates, state = tx.update(grads, state, params)
        norm = gn.find(state, gn.ClipMetrics)[0].norms
        return (optax.apply_updates(params, updates), state), norm

    (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), batches)
    return {"accuracy": loss_fn(params, test)[1], "norms": norms}


def run(quick: bool = False) -> experiment.Outcome:
    """Runs every rate and seed with and without the clip."""
    steps, length = (20, 10) if quick else (6000, 50)
    limits = {"none": np.inf, "global 1.0": 1.0}
    rates = [0.01, 0.03, 0.1, 0.3]
    rngs = np.random.default_rng(0).spawn(4)
    seeds = [
        (
            initial_params(rng),
            sequences(rng, (steps, BATCH), length),
            sequences(rng, (1000,), length),
        )
        for rng in rngs
    ]
    runs = partial(experiment.all_runs, axes=(np.array(rates), experiment.stack(seeds)))
    found = experiment.side_by_side(
        {clip: partial(runs, partial(train, limit)) for clip, limit in limits.items()}
    )
    accuracy, norms = (
        np.stack([arm[name] for arm in found.values()])
        for name in ("accuracy", "norms")
    )
    learned = (accuracy > LEARNED).sum(axis=-1)
    rows = [
        {
            "rate": rate,
            "clip": clip,
            "accuracy, median": np.median(accuracy[i, j]),
            "best seed": accuracy[i, j].max(),
            f"seeds above {LEARNED}": f"{learned[i, j]} of {len(seeds)}",
            "largest norm": norms[i, j].max(),
            "steps with norm > 1": f"{(norms[i, j] > 1).mean():.1%}",
        }
        for j, rate in enumerate(rates)
        for i, clip in enumerate(limits)
    ]
    failed = [
        str(rate) for rate, n in zip(rates, learned.T, strict=True) if not n.any()
    ]
    findings = [
        f"Above {LEARNED} (chance is {CHANCE}): {learned[0].sum()} of"
        f" {accuracy[0].size} runs without the clip, {learned[1].sum()} with it.",
        f"Rates that fail in both arms: {', '.join(failed) or 'none'}.",
        f"The clip does not keep the norm small: the largest is {norms[0].max():.3g}"
        f" without it, {norms[1].max():.3g} with it. It keeps the step small.",
    ]
    return experiment.Outcome(
        rows, findings, lambda figure: draw(figure, rates, accuracy, norms)
    )


def draw(figure: Any, rates: list, accuracy: np.ndarray, norms: np.ndarray) -> None:
    """Draws the accuracy of every run, and the norms of those at the second rate."""
    left, right = figure.subplots(1, 2)
    for arm, label in enumerate(["no clip", "clip at norm 1"]):
        color = experiment.COLORS[arm]
        at = np.arange(len(rates))[:, None] + np.linspace(-0.09, 0.09, 4) + arm * 0.3
        left.plot(at.ravel(), accuracy[arm].ravel(), "o", c=color, ms=5, label=label)
        every = max(1, norms.shape[-1] // 120)
        kept = norms[arm, 1, :, : norms.shape[-1] // every * every]
        peaks = kept.reshape(len(kept), -1, every).max(axis=-1)
        steps = every * (np.arange(peaks.shape[1]) + 0.5)
        right.plot(steps, peaks.T, c=color, lw=1, alpha=0.75)
    left.axhline(CHANCE, c="0.5", lw=1, ls="--", label="chance")
    left.set_xticks(np.arange(len(rates)) + 0.15, [f"{rate:g}" for rate in rates])
    left.set(xlabel="learning rate", ylabel="accuracy at the end", ylim=(0.15, 1.05))
    left.set_title("A dot is a run", fontsize="medium")
    left.legend(frameon=False)
    right.axhline(1, c="0.5", lw=1, ls="--")
    right.set(xlabel="step", ylabel="gradient norm before the clip", yscale="log")
    title = f"Rate {rates[1]:g}, four seeds: largest of every {every} steps"
    right.set_title(title, fontsize="medium")


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("rnn_explosion", run)
