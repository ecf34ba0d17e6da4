"""Branches: for what is hardly ever needed, and to keep kernels apart on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from gradnorm_jax._sharding import is_on_one_device


def seldom(
    needed: jax.Array, rare: Callable[..., Any], usual: Callable[..., Any], *args: Any
) -> Any:
    """Returns `rare(*args)` where it is needed; it must be right where it is not, too.

    It has no derivative in reverse: what enters must have none, or one of its own.
    Under `vmap`, where a branch would be computed for all anyway, there is none: JAX
    chooses there between all that enters a branch, which fails on Explicit axes, and in
    `shard_map` for what is the same on every device.
    """

    @custom_vmap
    def choose(needed: jax.Array, *args: Any) -> Any:
        return jax.lax.cond(needed, rare, usual, *args)

    @choose.def_vmap
    def _(size: int, batched: list, needed: jax.Array, *args: Any) -> tuple[Any, Any]:
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        result = jax.vmap(rare, tuple(in_axes[1:]), axis_size=size)(*args)
        return result, jax.tree.map(lambda _: True, result)

    return choose(needed, *args)


def apart(fun: Callable[..., Any], *args: Any) -> Any:
    """Returns `fun(*args)`, kept on a CPU from being compiled into what uses it.

    There XLA repeats the few scalar operations that lead to a factor inside the kernel
    of every leaf, and computes what a sum reads again, entry by entry, inside the sum.
    A branch that is always taken keeps them apart, on one device.
    """
    arrays = jax.tree.leaves(args)
    traced = any(isinstance(x, Tracer) for x in arrays)
    some = next((k for k, x in enumerate(arrays) if jnp.size(x)), None)
    if not traced or some is None or not all(map(is_on_one_device, arrays)):
        return fun(*args)
    run = jax.jit(fun, inline=True)  # traced once

    def behind_a_branch(*args: Any) -> Any:
        result = jax.eval_shape(run, *args)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
        entry = jax.lax.stop_gradient(jax.tree.leaves(args)[some]).reshape(-1)[0]
        always = _no_square_is_2_modulo_4(jnp.real(entry).astype(jnp.int32))
        return jax.lax.cond(always, run, lambda *_: nothing, *args)

    return jax.lax.platform_dependent(*args, cpu=behind_a_branch, default=run)


@custom_vmap
def _no_square_is_2_modulo_4(number: jax.Array) -> jax.Array:
    """True, which XLA does not find out, and one truth for all that is mapped.

    It holds of products that wrap around, too.
    """
    return number * number % 4 != 2


@_no_square_is_2_modulo_4.def_vmap
def _(size: int, batched: list[bool], number: jax.Array) -> tuple[jax.Array, bool]:
    return _no_square_is_2_modulo_4(jnp.sum(number)), False
