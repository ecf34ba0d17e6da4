"""A network learns handwritten digits, watched and clipped, with a fault put in.

The record shows the fault, what the clip made of it, and the finding that names it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradnorm_jax import monitoring, telemetry
from gradnorm_jax.methods import clip_by_global_norm
from gradnorm_jax.monitoring import Finding
from gradnorm_jax.watching import watch

Progress = Callable[[int, int, str], None]


class Fault(NamedTuple):
    """A way for a training run to go wrong, and the finding that it leads to."""

    sentence: str
    code: str | None


#: The faults that can be put into the run.
FAULTS = {
    "spike": Fault(
        "Half-way some batches are corrupted: pixels 100 times too bright, labels at"
        " random.",
        "spike",
    ),
    "dead": Fault(
        "Half-way the biases of one layer fall to -100, so that all its ReLUs are off.",
        "dead",
    ),
    "nan": Fault("Half-way one pixel of one batch is NaN.", "non-finite"),
    "vanish": Fault(
        "The network is eleven dense layers with sigmoids in between, trained by SGD.",
        "vanishing",
    ),
    "explode": Fault(
        "The learning rate never stops growing, to 1,000 times what it began with.",
        "exploding",
    ),
    "none": Fault("Nothing is wrong with it.", None),
}
_INNER = 25  # steps in one `scan`
_BATCH = 64
_RATE = 2e-3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training run, and where its record lies.

    `largest_norm` is the largest finite norm, and `burst` are the corrupted steps.
    """

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
    findings: tuple[Finding, ...]

    @property
    def fate(self) -> str:
        """What became of the largest norm."""
        clipped = self.largest_norm > self.limit
        return f"clipped to {self.limit:g}" if clipped else "not clipped"


def train(
    directory: Path,
    *,
    steps: int = 1000,
    max_norm: float = 1.0,
    seed: int = 0,
    fault: str = "spike",
    progress: Progress = lambda step, steps, text: None,
) -> Outcome:
    """Trains on the digits that ship with scikit-learn, and writes record and report.

    Args:
      directory: Where the run goes; it may not hold another one.
      steps: How many steps of 64 images to train, rounded up to a multiple of 25.
      max_norm: The largest global norm of the gradients.
      seed: Seeds the weights and the batches.
      fault: One of `FAULTS`.
      progress: Called with the step, the number of steps, and a line to show.

    Raises:
      ModuleNotFoundError: If Flax or scikit-learn is not installed; says how to.
      FileExistsError: If `directory` holds a run.
      ValueError: If there is no such fault.
    """
    if fault not in FAULTS:
        raise ValueError(
            f"`train(fault=...)` must be one of {tuple(FAULTS)}, got {fault!r}."
        )
    train_set, test_set = _digits()
    model = _network(fault)
    outer = -(-steps // _INNER)
    steps = outer * _INNER
    half = steps // 2
    burst = range(half, half + min(8, _INNER)) if fault == "spike" else range(0)

    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, train_set[0][:1])["params"]
    tx = watch(
        optax.chain(clip_by_global_norm(max_norm), _optimizer(fault, steps)),
        window=2 * _INNER,
    )
    opt_state = jax.jit(tx.init)(params)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    def spoiled(params: Any, batch: tuple, number: jax.Array) -> tuple[Any, tuple]:
        images, labels = batch
        if fault == "spike":
            corrupted = (number >= burst.start) & (number < burst.stop)
            noise_key = jax.random.fold_in(key, steps + number)
            noise = jax.random.randint(noise_key, labels.shape, 0, 10)
            images = jnp.where(corrupted, 100 * images, images)
            labels = jnp.where(corrupted, noise, labels)
        if fault == "nan":
            pixel = jnp.where(number == half, jnp.nan, images[0, 0, 0, 0])
            images = images.at[0, 0, 0, 0].set(pixel)
        if fault == "dead":
            dense = params["Dense_0"]
            bias = jnp.where(number == half, -100.0, dense["bias"])
            params = {**params, "Dense_0": {**dense, "bias": bias}}
        return params, (images, labels)

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = carry
        batch = _batch(train_set, jax.random.fold_in(key, number))
        params, batch = spoiled(params, batch, number)
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        images, labels = test_set
        logits = model.apply({"params": params}, images)
        return jnp.mean(jnp.argmax(logits, -1) == labels)

    steps_of = jax.jit(
        lambda params, opt_state, first: jax.lax.scan(
            step, (params, opt_state), first + jnp.arange(_INNER)
        ),
        donate_argnums=(0, 1),
    )
    with monitoring.Monitor(params, every=1, dir=directory, warn="off") as monitor:
        for block in range(outer):
            (params, opt_state), losses = steps_of(params, opt_state, block * _INNER)
            monitor(opt_state)
            record = telemetry.scalars(opt_state)
            norm = record["grad_norm/global_preclip"]
            progress(
                (block + 1) * _INNER,
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
    largest = int(np.where(np.isfinite(norms), norms, -1).argmax())
    report = directory / "report.html"
    findings = tuple(monitoring.diagnose(history))
    monitoring.write(history, report, findings)
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
        pictures=tuple(monitoring.save_all(history, directory, findings)),
        findings=findings,
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


def _network(fault: str) -> Any:
    try:
        from flax import linen as nn
    except ModuleNotFoundError as error:
        raise _missing("flax", error) from error

    # A ReLU would soon be off for good at such a rate, and nothing left to grow.
    relu = nn.leaky_relu if fault == "explode" else nn.relu

    class Convolutional(nn.Module):
        """Two convolutions, two dense layers."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = relu(nn.Conv(16, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = relu(nn.Conv(32, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(x)

    class Deep(nn.Module):
        """Eleven dense layers with sigmoids in between, as was once usual."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = x.reshape(x.shape[0], -1)
            for _ in range(10):
                x = nn.sigmoid(nn.Dense(32)(x))
            return nn.Dense(10)(x)

    return Deep() if fault == "vanish" else Convolutional()


def _optimizer(fault: str, steps: int) -> optax.GradientTransformation:
    if fault == "vanish":  # Adam would even out the scale, and in the end learn
        return optax.sgd(0.1)
    if fault == "explode":
        return optax.adamw(optax.exponential_decay(_RATE, steps, 1e3))
    return optax.adamw(_RATE)


def _missing(package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"The demo needs {package}, which is not installed. Install what it needs with"
        " `pip install 'gradnorm-jax[demo]'`.",
        name=error.name,
    )


def _batch(
    data: tuple[jax.Array, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, labels = data
    chosen = jax.random.randint(key, (_BATCH,), 0, len(labels))
    return images[chosen], labels[chosen]


__all__ = ["FAULTS", "Fault", "Outcome", "train"]
