"""A convolutional network learns handwritten digits, watched and clipped.

Half-way a burst of corrupted batches comes in: pixels a hundred times too bright,
labels at random. The record shows it, and what the clip made of it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax import monitoring, telemetry
from gradnorm_jax.methods import clip_by_global_norm
from gradnorm_jax.watching import watch

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training run, and where its record lies."""

    steps: int
    accuracy: float
    clipped: int
    burst: range
    clipped_in_burst: int
    largest_norm: float
    largest_step: int
    limit: float
    run: Path
    report: Path
    pictures: tuple[Path, ...]


def train(
    directory: Path,
    *,
    steps: int = 1000,
    max_norm: float = 1.0,
    seed: int = 0,
    progress: Progress = lambda step, steps, text: None,
) -> Outcome:
    """Trains on the digits that ship with scikit-learn, and writes record and report.

    Args:
      directory: Where the run goes; it may not hold another one.
      steps: How many steps of 64 images to train, rounded up to a multiple of 25.
      max_norm: The largest global norm of the gradients.
      seed: Seeds the weights and the batches.
      progress: Called with the step, the number of steps, and a line to show.

    Raises:
      ModuleNotFoundError: If Flax or scikit-learn is not installed; says how to.
      FileExistsError: If `directory` holds a run.
    """
    train_set, test_set = _digits()
    model = _network()
    inner = 25
    outer = -(-steps // inner)
    steps = outer * inner
    burst = range(steps // 2, steps // 2 + min(8, inner))

    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, train_set[0][:1])["params"]
    tx = watch(
        optax.chain(clip_by_global_norm(max_norm), optax.adamw(2e-3)),
        window=2 * inner,
    )
    opt_state = jax.jit(tx.init)(params)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = carry
        images, labels = _batch(train_set, jax.random.fold_in(key, number))
        corrupted = (number >= burst.start) & (number < burst.stop)
        images = jnp.where(corrupted, 100 * images, images)
        noise = jax.random.randint(
            jax.random.fold_in(key, steps + number), (64,), 0, 10
        )
        labels = jnp.where(corrupted, noise, labels)
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        images, labels = test_set
        logits = model.apply({"params": params}, images)
        return jnp.mean(jnp.argmax(logits, -1) == labels)

    steps_of = jax.jit(
        lambda params, opt_state, first: jax.lax.scan(
            step, (params, opt_state), first + jnp.arange(inner)
        ),
        donate_argnums=(0, 1),
    )
    with monitoring.Monitor(params, every=1, dir=directory) as monitor:
        for block in range(outer):
            (params, opt_state), losses = steps_of(params, opt_state, block * inner)
            monitor(opt_state)
            record = telemetry.scalars(opt_state)
            norm = record["grad_norm/global_preclip"]
            progress(
                (block + 1) * inner,
                steps,
                f"loss {losses[-1]:.3f}  gradient norm {norm:.2f}"
                f"  clipped so far {record['clip/rate']:.0%}",
            )
    return _outcome(directory, float(accuracy(params)), burst, max_norm)


def _outcome(
    directory: Path, accuracy: float, burst: range, max_norm: float
) -> Outcome:
    history = monitoring.load(directory)
    norms = history.global_norm("grad")
    clipped = history.scalars["clip/scale"] < 1
    largest = int(norms.argmax())
    report = directory / "report.html"
    monitoring.write(history, report)
    return Outcome(
        steps=len(norms),
        accuracy=accuracy,
        clipped=int(clipped.sum()),
        burst=burst,
        clipped_in_burst=int(clipped[burst.start : burst.stop].sum()),
        largest_norm=float(norms[largest]),
        largest_step=int(history.steps[largest]),
        limit=max_norm,
        run=directory,
        report=report,
        pictures=tuple(monitoring.save_all(history, directory)),
    )


def _digits() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise _missing("scikit-learn", error) from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype("float32").reshape(-1, 8, 8, 1)
    parts = train_test_split(
        images, labels.astype("int32"), test_size=0.2, random_state=0
    )
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return (train_images, train_labels), (test_images, test_labels)


def _network() -> Any:
    try:
        from flax import linen as nn
    except ModuleNotFoundError as error:
        raise _missing("flax", error) from error

    class Network(nn.Module):
        """Two convolutions, two dense layers."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(nn.Conv(16, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.relu(nn.Conv(32, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(x)

    return Network()


def _missing(package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"The demo needs {package}, which is not installed. Install what it needs with"
        " `pip install 'gradnorm-jax[demo]'`.",
        name=error.name,
    )


def _batch(
    data: tuple[jax.Array, jax.Array], key: jax.Array, size: int = 64
) -> tuple[jax.Array, jax.Array]:
    images, labels = data
    chosen = jax.random.randint(key, (size,), 0, len(labels))
    return images[chosen], labels[chosen]


__all__ = ["Outcome", "train"]
