"""Wrong labels show in the norms of per-example gradients, as they do in the loss.

One training label in twenty is changed to another digit. After some epochs the examples
are ranked by the norm of their own gradient, by their own loss, and by chance: how many
of the highest 5% are those with wrong labels? For as many examples are picked as there
are wrong labels, so that precision and recall are one number.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits, experiment

WRONG = 0.05
EPOCHS = [1, 2, 5, 10, 20, 40, 80]
SCORES = ["gradient norm", "loss", "chance"]


class Seed(NamedTuple):
    """Where a run starts, its labels, and its batches."""

    params: Any
    labels: np.ndarray  # of all training images
    is_wrong: np.ndarray
    batches: np.ndarray  # which images: [epochs, steps, batch]
    chance: np.ndarray  # a score of each image, at random


def seeds(number: int, epochs: int) -> Seed:
    """Returns parameters, labels of which some are wrong, and shuffled batches."""
    labels = digits.load()[1]
    steps = len(labels) // digits.BATCH

    def one(rng: np.random.Generator) -> Seed:
        is_wrong = np.zeros(len(labels), bool)
        is_wrong[: round(WRONG * len(labels))] = True
        is_wrong = rng.permutation(is_wrong)
        shift = rng.integers(1, digits.CLASSES, len(labels))
        orders = [rng.permutation(len(labels)) for _ in range(epochs)]
        batches = np.stack(orders)[:, : steps * digits.BATCH]
        return Seed(
            digits.two_layers(rng),
            np.where(is_wrong, (labels + shift) % digits.CLASSES, labels),
            is_wrong,
            batches.reshape(epochs, steps, digits.BATCH),
            rng.random(len(labels)),
        )

    return experiment.stack(
        [one(rng) for rng in np.random.default_rng(0).spawn(number)]
    )


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the loss of one image."""
    image, label = example
    logits = digits.perceptron(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def found_by(score: jax.Array, is_wrong: jax.Array) -> jax.Array:
    """Returns which share of the wrong labels a pick of as many by score finds."""
    picked = jnp.argsort(-score)[: round(WRONG * len(is_wrong))]
    return jnp.mean(is_wrong[picked].astype(jnp.float32))


def train(epochs: list[int], seed: Seed) -> dict[str, jax.Array]:
    """Trains on all labels, and after some epochs looks for the wrong ones."""
    images, _, test_images, test_labels = map(jnp.asarray, digits.load())
    tx = optax.adam(3e-3)

    def step(carry: tuple, batch: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        mean_loss = lambda params: jnp.mean(  # noqa: E731
            jax.vmap(loss_fn, (None, 0))(params, (images[batch], seed.labels[batch]))
        )
        updates, state = tx.update(jax.grad(mean_loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: tuple, batches: jax.Array) -> tuple[tuple, dict]:
        carry, _ = jax.lax.scan(step, carry, batches)
        compute = gn.value_and_per_example_norms(loss_fn)
        losses, norms = compute(carry[0], (images, seed.labels))
        scores = zip(SCORES, (norms, losses, seed.chance), strict=True)
        shares = {name: found_by(score, seed.is_wrong) for name, score in scores}
        right = [
            jnp.argmax(digits.perceptron(carry[0], x), axis=-1) == y
            for x, y in ((test_images, test_labels), (images, seed.labels))
        ]
        learned = jnp.sum(right[1] & seed.is_wrong) / jnp.sum(seed.is_wrong)
        return carry, shares | {"accuracy": jnp.mean(right[0]), "learned": learned}

    carry = seed.params, tx.init(seed.params)
    _, record = jax.lax.scan(epoch, carry, seed.batches)
    return jax.tree.map(lambda x: x[np.array(epochs) - 1], record)


def run(quick: bool = False) -> experiment.Outcome:
    """Trains with wrong labels, and looks for them after more and more epochs."""
    epochs = EPOCHS[:3] if quick else EPOCHS
    number = 2 if quick else 5
    axes = (seeds(number, epochs[-1]),)
    found = experiment.all_runs(partial(train, epochs), axes)
    rows = [
        {
            "epochs": after,
            **{f"found by {name}": found[name][:, place].mean() for name in SCORES},
            "by gradient norm, lowest seed": found["gradient norm"][:, place].min(),
            "by loss, lowest seed": found["loss"][:, place].min(),
            "test accuracy": found["accuracy"][:, place].mean(),
            "wrong labels learned": f"{found['learned'][:, place].mean():.0%}",
        }
        for place, after in enumerate(epochs)
    ]
    return experiment.Outcome(
        rows, _findings(epochs, found), partial(draw, epochs, found)
    )


def _findings(epochs: list[int], found: dict[str, np.ndarray]) -> list[str]:
    means = {name: found[name].mean(axis=0) for name in SCORES}
    best = {name: int(mean.argmax()) for name, mean in means.items()}
    gaps = means["gradient norm"] - means["loss"]
    seeds_ahead = (found["gradient norm"] > found["loss"]).sum(axis=0)
    last = best["gradient norm"]
    return [
        "Of the labels that are wrong, among as many picked: "
        + ", ".join(
            f"{means[name][place]:.1%} by {name} after epoch {epochs[place]}"
            for name, place in best.items()
            if name != "chance"
        )
        + f", at best; {means['chance'].mean():.1%} by chance.",
        f"By gradient norm less by loss: {gaps.min():+.1%} at worst, after epoch"
        f" {epochs[int(gaps.argmin())]}, and {gaps.max():+.1%} at best, after epoch"
        f" {epochs[int(gaps.argmax())]}. After epoch {epochs[last]} the norm is ahead"
        f" in {seeds_ahead[last]} of {len(found['loss'])} seeds.",
    ]


def draw(epochs: list[int], found: dict[str, np.ndarray], figure: Any) -> None:
    """Draws what each score finds: a dot for each seed, a line for their mean."""
    axes = figure.subplots()
    for color, name in zip(experiment.COLORS, SCORES, strict=False):
        axes.plot(epochs, found[name].T, "o", c=color, ms=4, alpha=0.4, mew=0)
        axes.plot(epochs, found[name].mean(axis=0), c=color, label=f"by {name}")
    axes.set(xscale="log", xlabel="epochs", ylabel="wrong labels found", ylim=(0, 1))
    axes.set_xticks(epochs, [str(after) for after in epochs])
    axes.minorticks_off()
    axes.legend(frameon=False)


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("mislabelled_digits", run)
