"""The clip by global norm alone: into new memory, and where the gradients lie.

A clip has to read its tree twice, for the norm and for the scaling, and to write it
once. It is charged with these three times its bytes. On a CPU, where a stream only
reads, its share can be above 1: to write where one reads takes little more time. New
memory is not there before it is written to: a copy shows what that takes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, norms, torch_peer, trees
from benchmarks.comparing import compare, refuse_wrong, result_of
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import Arm, arm, build

QUICK_TREES = ("gpt2",)
AMONG_ALL = ("gpt2", "small", "stacked")
DONATED = ("gpt2", "llama")
MAX_NORM = 1.0  # far below the norms of all trees but the tiny ones
COPY = "a copy"


def rows(options: Options) -> Iterator[Row]:
    """Compares the clip with Optax's; where the gradients lie, with PyTorch's too."""
    among_all = QUICK_TREES if options.quick else AMONG_ALL
    names = norms.TREES if options.whole else among_all
    for name, dtype in norms.cases(options, names):
        grads = trees.fill(options.shapes(name), dtype)
        for donated in (False, True) if name in DONATED else (False,):
            # In a quick run one of the two has to do: new memory in float32.
            if not options.quick or donated == (dtype != jnp.float32):
                yield from _clip(options, name, dtype, grads, donated=donated)


def clips() -> dict[str, Any]:
    """Returns the two transformations that do the same."""
    return {
        "ours": gn.clip_by_global_norm(MAX_NORM),
        "optax": optax.clip_by_global_norm(MAX_NORM),
    }


def _clip(
    options: Options, name: str, dtype: Any, grads: Any, *, donated: bool
) -> Iterator[Row]:
    arms = {peer: _arm(tx, grads, donated=donated) for peer, tx in clips().items()}
    if not donated and dtype != jnp.float32:
        arms[COPY] = arm(lambda grads: jax.tree.map(jnp.copy, grads), grads)
    if donated and options.torch:
        arms[torch_peer.CLIP] = torch_peer.clips(grads)
    if not options.tiny:
        refuse_wrong(abs(trees.true_norm(result_of(arms["ours"])[0]) / MAX_NORM - 1))
    what = "clip, donated" if donated else "clip"
    yield from compare(
        options,
        Row("clip", what, name, jnp.dtype(dtype).name, ""),
        arms,
        moved=3 * trees.size(grads),
        limits=lambda peer: limits.clip(options.device, name, dtype, peer),
    )


def _arm(tx: Any, grads: Any, *, donated: bool) -> Arm:
    """A clip of the same gradients again and again; of a copy, where it uses them up.

    What was clipped before is at its limit, and may be left alone at less cost.
    """
    state = tx.init(grads)

    def update(grads: Any, state: Any) -> Any:
        return tx.update(grads, state)

    program = build(
        jax.jit(update, donate_argnums=(0,) if donated else ()), grads, state
    )

    def copied() -> tuple[Any, ...]:
        return (jax.block_until_ready(jax.tree.map(jnp.copy, grads)), state)

    if donated:
        return Arm(program.run, copied, program=program, repeat=False)
    return Arm(lambda: program.run(grads, state), program=program)
