"""The gradient noise scale, estimated in passing, is the true one if it is averaged.

A small network learns the digits by plain SGD, in batches of 64. At every step both
parts of the noise scale are estimated from the norms of the gradients of these 64
examples, averaged over steps, and divided. The truth comes from all 1437 examples,
every ten steps, and is averaged likewise: where it is at one step says little, as the
square of the true gradient goes up and down from step to step. When nearly all is
noise, a step alone cannot tell it from gradient: its estimate is often not valid.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment

RATE, EVERY = 0.1, 10
MEMORIES = {1: 0.0, 10: 0.9, 200: 0.995}  # of how many steps: the decay
SHOWN = [50, 100, 200, 400, 800, 1600, 3200]
# The examples at hand are all there are: their mean is the true gradient.
EVERYTHING = {"total_batch_size": 10**9}


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the loss of one example."""
    image, label = example
    logits = digits.perceptron(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def measure(params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple:
    """Returns the loss, the gradient, and the norms by which noise is told."""

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

    loss, grads = jax.value_and_grad(mean_loss)(params)
    norms = gn.per_example_norms(loss_fn)(params, batch)
    return loss, grads, norms, gn.global_norm(grads)


def train(seed: tuple[Any, jax.Array]) -> dict[str, jax.Array]:
    """Trains a network; returns what is true and what is estimated every 10 steps."""
    start, batches = seed
    images, labels = map(jnp.asarray, digits.load()[:2])
    tx, slow = optax.sgd(RATE), gn.running_noise_scale(MEMORIES[200] ** EVERY)
    decays = jnp.array(list(MEMORIES.values()))

    def observe(decay: jax.Array, noise: Any, norms: tuple) -> Any:
        return gn.running_noise_scale(decay).update(noise, *norms)

    def step(carry: tuple, chosen: jax.Array) -> tuple[tuple, jax.Array]:
        params, state, noise = carry
        _, grads, *norms = measure(params, (images[chosen], labels[chosen]))
        noise = jax.vmap(observe, (0, 0, None))(decays, noise, norms)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, noise), gn.gradient_noise_scale(*norms).noise_scale

    def block(carry: tuple, batches: jax.Array) -> tuple[tuple, dict]:
        training, noise_of_all = carry
        training, alone = jax.lax.scan(step, training, batches)
        params, _, noise = training
        loss, _, *norms = measure(params, (images, labels))
        noise_of_all = slow.update(noise_of_all, *norms, **EVERYTHING)
        return (training, noise_of_all), {
            "loss": loss,
            "truth": slow.read(noise_of_all).noise_scale,
            "estimates": jax.vmap(slow.read)(noise).noise_scale,
            "alone": alone,
        }

    noise = slow.init(jnp.zeros(len(MEMORIES)))
    carry = ((start, tx.init(start), noise), slow.init())
    return jax.lax.scan(block, carry, batches)[1]


def seed_of(rng: np.random.Generator, steps: int) -> tuple:
    """Returns first parameters, and which examples are in each batch."""
    images = digits.Stream.clean(rng, steps).images
    return digits.two_layers(rng), images.reshape(-1, EVERY, digits.BATCH)


def run(quick: bool = False) -> experiment.Outcome:
    """Trains three networks and compares the estimates with the truth."""
    steps = SHOWN[3 if quick else -1]
    rngs = np.random.default_rng(0).spawn(1 if quick else 3)
    seeds = experiment.stack([seed_of(rng, steps) for rng in rngs])
    found = experiment.all_runs(train, (seeds,))
    rows = [_row(found, step) for step in SHOWN if step <= steps]
    return experiment.Outcome(rows, _findings(found, rows), partial(draw, found))


def _row(found: dict[str, np.ndarray], step: int) -> experiment.Row:
    """Says what is known at a step, and how often since half as many steps."""
    at, since = step // EVERY - 1, step // EVERY // 2
    truth, estimate = found["truth"][:, at], found["estimates"][:, at, -1]
    valid = ~np.isnan(found["estimates"][:, since : at + 1])
    is_known = not np.any(np.isnan(estimate))
    ratio = estimate / truth
    row = {
        "step": step,
        "loss": found["loss"][:, at].mean(),
        "true noise scale": np.median(truth),
        "estimate": np.median(estimate) if is_known else "-",
        "estimate / truth, each seed": ", ".join(f"{x:.2f}" for x in ratio),
    }
    for name, share in zip(MEMORIES, valid.mean(axis=(0, 1)), strict=True):
        row[f"valid, over {name} step{'s' * (name > 1)}"] = f"{share:.0%}"
    batch_size = 2 ** round(np.log2(row["estimate"])) if is_known else "-"
    return row | {"suggested batch size": batch_size}


def _findings(found: dict[str, np.ndarray], rows: list[experiment.Row]) -> list[str]:
    settled = SHOWN[1] // EVERY
    truth = found["truth"][:, settled:]
    estimates = found["estimates"][:, settled:]
    alone = found["alone"][:, settled:]
    off = np.abs(np.log(estimates[..., -1] / truth))
    typical, seldom = np.exp(np.nanquantile(off, [0.5, 0.95]))
    shares = [f"{x:.1%}" for x in np.mean(~np.isnan(estimates), axis=(0, 1))]
    valid = ", ".join(f"{x} over {n}" for x, n in zip(shares, MEMORIES, strict=True))
    ratios = np.nanmean(alone, axis=(1, 2)) / truth.mean(axis=1)
    first, last = rows[0], rows[-1]
    return [
        f"From step {SHOWN[1]} on the average over 200 steps is off by a factor of less"
        f" than {typical:.2f} half of the time, and of less than {seldom:.2f} in 95 of"
        " 100.",
        f"Estimates that are valid, by how many steps they average: {valid}.",
        "To average the ratios of single steps instead, where they are valid, gives"
        f" {_span(ratios)} times the mean truth.",
        f"The suggested batch size rises from {first['suggested batch size']} at step"
        f" {first['step']} to {last['suggested batch size']} at step {last['step']}.",
    ]


def _span(values: np.ndarray) -> str:
    each = sorted({f"{x:.1f}" for x in values}, key=float)
    return each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}"


def draw(found: dict[str, np.ndarray], figure: Any) -> None:
    """Draws truth and estimate of the first seed, and how often estimates are valid."""
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    truth, estimates = found["truth"][0], found["estimates"]
    steps = EVERY * np.arange(1, len(truth) + 1)
    left.plot(steps, estimates[0, :, 0], ".", c="0.7", ms=3, label="a step alone")
    for k, color in zip((1, 2), experiment.COLORS, strict=False):
        name = f"over {list(MEMORIES)[k]} steps"
        left.plot(steps, estimates[0, :, k], c=color, lw=1, label=name)
    left.plot(steps, truth, c="0.1", label="truth, over 200 steps")
    left.set(xlabel="step", yscale="log", ylim=(10, 1e5))
    left.set_title("Gradient noise scale, examples", fontsize="medium")
    left.legend(frameon=False, fontsize="small", ncols=2)
    valid = ~np.isnan(estimates)
    cuts = np.unique(np.geomspace(1, len(steps), 12).astype(int))
    for k, color in zip(range(3), ("0.7", *experiment.COLORS), strict=False):
        shares = [valid[:, a:b, k].mean() for a, b in itertools.pairwise(cuts)]
        right.plot(steps[cuts[1:] - 1], shares, ".-", c=color)
    right.set(xlabel="step", xscale="log", ylim=(0, 1.05))
    right.set_title("Share of estimates that are valid", fontsize="medium")


if __name__ == "__main__":
    experiment.main("noise_scale", run)
