"""Bodies in Pallas, for GPUs: a launch reads many leaves, where XLA has one for each.

The plain bodies are the truth that these are tested against.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gradnorm_jax.kernels.reductions import Reduction

_BLOCK = 2**14  # entries of one program
_TILE = 2**10  # of them at a time
_LEAVES = 32  # of one launch: each is an argument and a branch of the kernel


class _Place(NamedTuple):
    """Which programs of a launch are for a leaf, and how many entries it has."""

    first: int
    blocks: int
    size: int

    def spec(self) -> pl.BlockSpec:
        """The block of each program; those for other leaves do not look at theirs."""
        return pl.BlockSpec(
            (_BLOCK,), lambda k: (jnp.clip(k - self.first, 0, self.blocks - 1),)
        )

    def of_leaf(self, body: Callable[[Any, Any], None]) -> None:
        """Runs `body` in the programs for the leaf, tile by tile."""
        program = pl.program_id(0)

        @pl.when((program >= self.first) & (program < self.first + self.blocks))
        def _() -> None:
            start = (program - self.first) * _BLOCK

            def is_inside(tile: jax.Array) -> jax.Array:
                return start + tile * _TILE + jnp.arange(_TILE) < self.size

            body(lambda tile: pl.ds(tile * _TILE, _TILE), is_inside)


def reduce_leaves(
    reductions: Sequence[Reduction],
    leaves: Sequence[jax.Array],
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """Reduces whole leaves, of real numbers: `[leaves]` for each reduction.

    Args:
      reductions: What is kept of the entries.
      leaves: Arrays of any shapes and dtypes.
      dtype: What is computed and returned in.
      interpret: Whether JAX runs the kernel step by step, which it does anywhere.
    """
    launches = _launches(leaves)
    found = [
        _launched(reductions, [leaves[k] for k in at], dtype, interpret=interpret)
        for at in launches
    ]
    order = np.argsort(list(itertools.chain(*launches)))
    empty = jnp.zeros((0, len(reductions)), dtype)
    cells = jnp.concatenate([*found, empty])[order.astype(int)]
    return [cells[:, k] for k in range(len(reductions))]


def _launches(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """Which leaves are read by one launch: some of one dtype."""
    by_dtype: dict[Any, list[int]] = {}
    for k, x in enumerate(leaves):
        by_dtype.setdefault(x.dtype, []).append(k)
    return [
        at[start : start + _LEAVES]
        for at in by_dtype.values()
        for start in range(0, len(at), _LEAVES)
    ]


def _places(leaves: Sequence[jax.Array]) -> list[_Place]:
    counts = [max(1, pl.cdiv(x.size, _BLOCK)) for x in leaves]
    firsts = itertools.accumulate(counts, initial=0)
    return [
        _Place(first, count, x.size)
        for first, count, x in zip(firsts, counts, leaves, strict=False)
    ]


def _launched(
    reductions: Sequence[Reduction],
    leaves: Sequence[jax.Array],
    dtype: jnp.dtype,
    *,
    interpret: bool,
) -> jax.Array:
    """What reductions keep of the leaves of one launch: `[leaves, reductions]`."""
    places = _places(leaves)

    def kernel(*refs: Any) -> None:
        *inputs, out = refs
        for ref, place in zip(inputs, places, strict=True):
            place.of_leaf(functools.partial(reduce, ref, out))

    def reduce(ref: Any, out: Any, part: Callable, is_inside: Callable) -> None:
        def step(tile: jax.Array, joined: list[jax.Array]) -> list[jax.Array]:
            inside = is_inside(tile)
            x = triton.load(ref.at[part(tile)], mask=inside, other=0)
            return [
                one.join(own, jnp.where(inside, one.of(x, dtype), 0))
                for one, own in zip(reductions, joined, strict=True)
            ]

        start = [jnp.zeros(_TILE, dtype) for _ in reductions]
        joined = jax.lax.fori_loop(0, _BLOCK // _TILE, step, start)
        for k, (one, own) in enumerate(zip(reductions, joined, strict=True)):
            out[0, k] = one.across(own, (0,))

    total = places[-1].first + places[-1].blocks
    partials = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((total, len(reductions)), dtype),
        grid=(total,),
        in_specs=[place.spec() for place in places],
        out_specs=pl.BlockSpec((1, len(reductions)), lambda k: (k, 0)),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(*(x.reshape(-1) for x in leaves))
    bounds = [place.first for place in places[1:]]
    return jnp.stack(
        [
            jnp.stack([one.across(own[:, k], (0,)) for k, one in enumerate(reductions)])
            for own in jnp.split(partials, bounds)
        ]
    )
