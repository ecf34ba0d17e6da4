"""Differentially private training learns the digits, the worse the more is kept secret.

DP-SGD: batches by Poisson sampling, the gradient of each example clipped to a norm, and
Gaussian noise on their sum. The norm is a constant, or follows the median of the norms,
found privately too. An accountant says which epsilon that is. All learning rates were
tuned on other seeds but the same digits, which no epsilon here counts.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment
from gradnorm_jax import privacy

SIZE = 128  # of a batch, on average
DELTA = 1e-4
RATES = [0.1, 0.3, 1.0, 3.0]
MULTIPLIERS = [0.8, 1.5, 4.0]
NO_LIMIT = 1e6  # none of the digits comes near it
# The norm to which examples are clipped, and the noise multiplier.
CONSTANT = [(NO_LIMIT, 0.0), (1.0, 0.0), *((1.0, z) for z in MULTIPLIERS)]
MEDIAN = [(1.0, z) for z in MULTIPLIERS]  # where it starts


class Seed(NamedTuple):
    """Where a run starts, and who is in which batch: [steps, places]."""

    params: Any
    images: np.ndarray  # which one is at each place
    is_there: np.ndarray  # False for a place that is left empty
    number: np.ndarray  # what the noise is drawn from


def seeds(entropy: int, number: int, steps: int) -> Seed:
    """Returns parameters, and batches that each image joins on its own."""
    rng = np.random.default_rng(entropy)
    images = len(digits.load()[1])
    params = [digits.two_layers(rng) for _ in range(number)]
    drawn = rng.random((number, steps, images)) < SIZE / images
    places = drawn.sum(axis=-1).max()  # chance alone decides on it, not an image
    order = np.argsort(~drawn, axis=-1, kind="stable")[..., :places]
    is_there = np.take_along_axis(drawn, order, axis=-1)
    return Seed(
        experiment.stack(params), order, is_there, rng.integers(2**31, size=number)
    )


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the loss of one image."""
    image, label = example
    logits = digits.perceptron(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def train(
    adapts: bool, setting: tuple[Any, Any], rate: Any, seed: Seed
) -> dict[str, jax.Array]:
    """Trains a network privately, and returns its accuracy and how much was clipped."""
    limit, multiplier = setting
    images, labels, test_images, test_labels = map(jnp.asarray, digits.load())
    sum_key, count_key = jax.random.split(jax.random.key(seed.number))
    median = privacy.private_quantile(
        0.5,
        noise_multiplier=multiplier,
        expected_batch_size=SIZE,
        key=count_key,
        start=limit,
    )
    noise = privacy.add_gaussian_noise(
        None,  # each update is given the norm
        median.sum_noise_multiplier if adapts else multiplier,
        expected_batch_size=SIZE,
        key=sum_key,
    )
    tx = optax.chain(noise, optax.sgd(rate))

    def step(carry: tuple, batch: tuple) -> tuple[tuple, jax.Array]:
        params, opt_state, clip = carry
        places, is_there = batch
        norm = clip.l2_clip_norm if adapts else limit
        clipped = gn.clipped_grad(loss_fn, norm, reduce="sum")(
            params, (images[places], labels[places]), example_mask=is_there
        )
        updates, opt_state = tx.update(
            clipped.grads, opt_state, params, l2_clip_norm=norm
        )
        clip = median.update(clip, clipped.norms, is_there)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, clip), clipped.num_clipped / is_there.sum()

    carry = seed.params, tx.init(seed.params), median.init()
    (params, _, _), shares = jax.lax.scan(step, carry, (seed.images, seed.is_there))
    guesses = jnp.argmax(digits.perceptron(params, test_images), axis=-1)
    return {"accuracy": jnp.mean(guesses == test_labels), "clipped": jnp.mean(shares)}


def study(adapts: bool, quick: bool) -> dict[str, np.ndarray]:
    """Returns what came of each setting at the rate that was best on other seeds."""
    steps, tuned, seen = (40, 1, 1) if quick else (200, 3, 5)
    rates = np.array(RATES[1:3] if quick else RATES)
    settings = np.array(MEDIAN if adapts else CONSTANT)
    axes = tuple(settings.T), rates, seeds(0, tuned + seen, steps)
    found = experiment.all_runs(partial(train, adapts), axes)
    best = found["accuracy"][..., :tuned].mean(axis=-1).argmax(axis=-1)
    at_best = {name: x[np.arange(len(x)), best, tuned:] for name, x in found.items()}
    return at_best | {"rate": rates[best]}


def run(quick: bool = False) -> experiment.Outcome:
    """Trains without privacy, then with three multipliers and two kinds of clip."""
    steps, images = 40 if quick else 200, len(digits.load()[1])
    spent = {
        z: privacy.epsilon(
            noise_multiplier=z, sampling_rate=SIZE / images, steps=steps, delta=DELTA
        )
        for z in (0.0, *MULTIPLIERS)
    }
    arms = {
        "constant": partial(study, adapts=False, quick=quick),
        "median": partial(study, adapts=True, quick=quick),
    }
    found = experiment.side_by_side(arms)
    rows = [
        {
            "clip norm": _name(kind, limit),
            "noise multiplier": multiplier,
            f"epsilon at delta {DELTA:g}": _shown(spent[multiplier]),
            "accuracy": found[kind]["accuracy"][place].mean(),
            "lowest seed": found[kind]["accuracy"][place].min(),
            "highest": found[kind]["accuracy"][place].max(),
            "examples clipped": f"{found[kind]['clipped'][place].mean():.0%}",
            "learning rate": found[kind]["rate"][place],
        }
        for kind, settings in (("constant", CONSTANT), ("median", MEDIAN))
        for place, (limit, multiplier) in enumerate(settings)
    ]
    accuracy = {kind: arm["accuracy"].mean(axis=-1) for kind, arm in found.items()}
    findings = _findings(accuracy, spent)
    return experiment.Outcome(rows, findings, partial(draw, found, spent))


def _name(kind: str, limit: float) -> str:
    if limit == NO_LIMIT:
        return "none"
    return kind if kind == "median" else f"{limit:g}"


def _shown(epsilon: float) -> str:
    return f"{epsilon:.2f}" if np.isfinite(epsilon) else "none"


def _findings(accuracy: dict[str, np.ndarray], spent: dict[float, float]) -> list[str]:
    open_to_all, clipped, *private = accuracy["constant"]
    prices = ", ".join(
        f"{open_to_all - mean:+.3f} at epsilon {spent[z]:.2f}"
        for z, mean in zip(MULTIPLIERS, private, strict=True)
    )
    gains = ", ".join(f"{gain:+.3f}" for gain in accuracy["median"] - private)
    return [
        f"Without privacy the accuracy is {open_to_all:.3f}. Clipping alone costs"
        f" {open_to_all - clipped:+.3f}; with noise the price is {prices}.",
        "A norm that follows the median instead of the constant changes the accuracy by"
        f" {gains}.",
        "Each epsilon is that of one run: that its learning rate was tuned on the same"
        " digits is not counted.",
    ]


def draw(found: dict, spent: dict[float, float], figure: Any) -> None:
    """Draws the accuracy by epsilon: a dot for each seed, a line for their mean."""
    axes = figure.subplots()
    epsilons = np.array([spent[z] for z in MULTIPLIERS])
    for color, (kind, arm) in zip(experiment.COLORS, found.items(), strict=False):
        accuracy = arm["accuracy"][-len(MULTIPLIERS) :]
        axes.plot(epsilons, accuracy, "o", c=color, ms=4, alpha=0.4, mew=0)
        axes.plot(epsilons, accuracy.mean(axis=-1), c=color, label=f"clip norm: {kind}")
    means = found["constant"]["accuracy"].mean(axis=-1)
    names = ("no clip, no noise", "clip norm: constant, no noise")
    for style, name, mean in zip(("--", ":"), names, means, strict=False):
        axes.axhline(mean, c=experiment.COLORS[-1], ls=style, label=name)
    axes.set(xscale="log", xlabel=f"epsilon at delta {DELTA:g}", ylabel="accuracy")
    axes.set_xticks(epsilons, [f"{epsilon:.2g}" for epsilon in epsilons])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("private_digits", run)
