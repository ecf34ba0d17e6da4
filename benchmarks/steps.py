"""A clip inside an optimizer step that donates parameters and state, of Optax's in it.

A record of the gradients takes its norms from what the clip reads; one of the updates
and of the parameters too reads both, and writes the updates, which else are not there.
What that takes by itself, Optax's step with a plain norm of each of them shows.

A step reads the gradients twice, and reads and writes the parameters and each of the
optimizer's moments: AdamW is charged with 8 times the bytes of the tree, SGD with
momentum with 6, the record with none. Muon multiplies matrices and is not limited by
memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, trees
from benchmarks.clips import clips
from benchmarks.comparing import against_the_first, compare
from benchmarks.options import Options
from benchmarks.rows import Limits, Row
from benchmarks.training import Step

OPTIMIZERS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "AdamW": (lambda: optax.adamw(1e-3), 8),
    "SGD": (lambda: optax.sgd(1e-2, momentum=0.9), 6),
    "Muon": (lambda: optax.contrib.muon(1e-3), None),
}

WATCHED = [("AdamW", "gpt2", jnp.float32), ("AdamW", "gpt2", jnp.bfloat16)]
BY_HAND = "optax and its norms"


def rows(options: Options) -> Iterator[Row]:
    """Compares steps of AdamW on every dtype, of SGD, and of Muon if asked for."""
    muon_tree = "gpt2" if options.device != "cpu" else "dense"
    cases: list[tuple[str, str, Any]] = WATCHED[:1]
    if not options.quick:
        cases += [
            *WATCHED[1:],
            ("AdamW", "gpt2", jnp.float16),
            ("AdamW", "stacked", jnp.float32),
            ("SGD", "gpt2", jnp.float32),
        ]
    if options.whole or options.tiny:
        cases += [
            ("Muon", muon_tree, jnp.float32),
            ("AdamW", "small", jnp.float32),
            ("SGD", "gpt2", jnp.bfloat16),
        ]
    for optimizer, tree, dtype in cases:
        yield from _clipped(options, optimizer, tree, dtype)
    if not options.quick:
        yield from _watched(options, *WATCHED[0])


def _clipped(options: Options, optimizer: str, tree: str, dtype: Any) -> Iterator[Row]:
    """A clip, and a clip with a record of the gradients, of Optax's clip."""
    make, times = OPTIMIZERS[optimizer]
    grads = trees.fill(options.shapes(tree), dtype)
    chains = {peer: optax.chain(clip, make()) for peer, clip in clips().items()}
    steps = {"optax": chains["optax"], f"clip in {optimizer}": chains["ours"]}
    if (optimizer, tree, dtype) in WATCHED:
        steps["and its grads watched"] = gn.watch(chains["ours"], record=("grad",))
    yield from against_the_first(
        options,
        Row("step", "", tree, jnp.dtype(dtype).name, ""),
        {name: Step(tx, grads).arm() for name, tx in steps.items()},
        moved=times and times * trees.size(grads),
        limits=limits.step(options.device, optimizer),
        seconds=options.seconds,
    )


def _watched(options: Options, optimizer: str, tree: str, dtype: Any) -> Iterator[Row]:
    """A clip with a whole record, of Optax's clip, alone and with the same norms."""
    make, _ = OPTIMIZERS[optimizer]
    grads = trees.fill(options.shapes(tree), dtype)
    chains = {peer: optax.chain(clip, make()) for peer, clip in clips().items()}
    steps = {
        "ours": gn.watch(chains["ours"]),
        "optax": chains["optax"],
        BY_HAND: _with_norms(chains["optax"]),
    }
    limit = limits.step(options.device, optimizer)
    yield from compare(
        options,
        Row("step", "clip and all watched", tree, jnp.dtype(dtype).name, ""),
        {name: Step(tx, grads).arm() for name, tx in steps.items()},
        limits=lambda peer: limit if peer == "optax" else Limits(),
        seconds=options.seconds,
    )


def _with_norms(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the norms of updates and parameters, as one would write it by hand."""

    def norms(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))), tree)

    def init(params: Any) -> Any:
        return tx.init(params), norms(params), norms(params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, inner = tx.update(grads, state[0], params)
        return updates, (inner, norms(updates), norms(params))

    return optax.GradientTransformation(init, update)
