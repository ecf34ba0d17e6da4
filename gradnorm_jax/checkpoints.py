"""What a checkpoint should hold: an optimizer's state without its record."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax._typing import Tree
from gradnorm_jax.telemetry import WatchState, find


def attach(
    opt_state: Any, params: Tree, tx: optax.GradientTransformation, *, step: int = 0
) -> Any:
    """Returns the state of a watched optimizer around a state that was not watched.

    A record is no part of the training: save `detach(opt_state)`, and put a new record
    around what was restored.

    Args:
      opt_state: A state of what `tx` is without `watch`, as `detach` returns it.
      params: The parameters.
      tx: The watched optimizer.
      step: How many updates there were, from which the new record counts on.

    Returns:
      The state of `tx.init(params)`, with all but the record from `opt_state`.

    Raises:
      ValueError: If `tx` is not watched, or `opt_state` is of another optimizer or of
        other parameters.

    Example:
      >>> tx, params = gn.watch(optax.adam(0.1)), {"w": jnp.ones(2)}
      >>> saved = detach(tx.init(params))
      >>> attach(saved, params, tx, step=100).step
      Array(100, dtype=int32)
    """
    if not hasattr(step, "__index__") or operator.index(step) < 0:
        raise ValueError(
            f"`attach(step=...)` must be a whole number of updates, got {step!r}."
        )
    if find(opt_state, WatchState):
        raise ValueError(
            "`attach(opt_state=...)` has a record already. Go on with it, or take it"
            " off by `detach(opt_state)`."
        )
    watched = tx.init(params)
    if not find(watched, WatchState):
        raise ValueError(
            "`attach(tx=...)` must be an optimizer with a record: make it with"
            " `watch(optax....)`."
        )
    bare = detach(watched)
    if jax.tree.structure(bare) != jax.tree.structure(opt_state):
        raise ValueError(
            "`attach(opt_state=...)` must be a state of `tx` without `watch`, of"
            f" structure {jax.tree.structure(bare)}, got one of structure"
            f" {jax.tree.structure(opt_state)}."
        )
    wanted, given = (map(_type, jax.tree.leaves(state)) for state in (bare, opt_state))
    for own, other in zip(given, wanted, strict=True):
        if own != other:
            raise ValueError(
                "`attach(params=...)` must be the parameters of `opt_state`, which has"
                f" a {own} where theirs is a {other}."
            )
    leaves = iter(jax.tree.leaves(opt_state))

    def filled(node: Any) -> Any:
        if not isinstance(node, WatchState):
            return next(leaves)
        inner = jax.tree.map(filled, node.inner_state, is_leaf=_is_watched)
        return node._replace(inner_state=inner, step=node.step + step)

    return jax.tree.map(filled, watched, is_leaf=_is_watched)


def detach(opt_state: Any) -> Any:
    """Returns a state without the records of `watch`: what a checkpoint should hold.

    Args:
      opt_state: An optimizer's state, or a tree that holds one.

    Raises:
      ValueError: If there is no record inside.

    Example:
      >>> state = gn.watch(optax.adam(0.1)).init({"w": jnp.ones(2)})
      >>> jax.tree.structure(detach(state)) == jax.tree.structure(
      ...     optax.adam(0.1).init({"w": jnp.ones(2)})
      ... )
      True
    """
    if not find(opt_state, WatchState):
        raise ValueError(
            "`detach(opt_state=...)` found no record of `watch` in a"
            f" {type(opt_state).__name__}. Save the state as it is."
        )

    def bare(node: Any) -> Any:
        if not isinstance(node, WatchState):
            return node
        return jax.tree.map(bare, node.inner_state, is_leaf=_is_watched)

    return jax.tree.map(bare, opt_state, is_leaf=_is_watched)


def _is_watched(node: Any) -> bool:
    return isinstance(node, WatchState)


def _type(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


__all__ = ["attach", "detach"]
