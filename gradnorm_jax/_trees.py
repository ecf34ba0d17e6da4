"""Leaves by name: what a tree holds, checked, and which leaf a pattern means."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax._typing import Tree


def leaf_names(tree: Tree) -> tuple[str, ...]:
    """Names the leaves of a tree by their paths, in the order of `jax.tree.leaves`.

    `ClipMetrics.first_nonfinite_leaf` is an index into those of the tree it clips.

    Example:
      >>> leaf_names({"dense": {"kernel": 1.0, "bias": None}, "scale": 2.0})
      ('dense/kernel', 'scale')
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
    )


def flatten(tree: Tree, caller: str) -> tuple[tuple[str, ...], list[Any], Any]:
    """Returns the names, the leaves as arrays and the structure of a tree of numbers.

    Leaves that only describe an array (`jax.ShapeDtypeStruct`) stay what they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    for position, x in enumerate(leaves):
        if isinstance(x, np.ndarray | np.generic) or not hasattr(x, "dtype"):
            leaves[position] = x = _as_array(x, tree, position, caller)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            name = leaf_names(tree)[position]
            raise TypeError(
                f"`{caller}`: leaf {name!r} has dtype {x.dtype}, but a gradient norm is"
                " taken of floating or complex leaves. Put `None` in its place, mask"
                " it with `optax.masked`, or cast it."
            )
    return leaf_names(tree), leaves, treedef


def _as_array(x: Any, tree: Tree, position: int, caller: str) -> jax.Array:
    try:
        return jnp.asarray(x)
    except TypeError:
        raise TypeError(
            f"`{caller}`: leaf {leaf_names(tree)[position]!r} is {x!r}, which is no"
            " array. Put `None` in its place, or take it out of the tree."
        ) from None


def matches(patterns: Mapping[str, Any], names: Sequence[str], caller: str) -> list:
    """Returns, for each name, the value of the first pattern that matches it whole.

    A name that no pattern matches gets `None`; a pattern that is the first to match no
    name is an error, for it is nearly always a slip of the pen.
    """
    compiled = {pattern: _compile(pattern, caller) for pattern in patterns}
    for pattern, expression in compiled.items():
        if not any(expression.fullmatch(name) for name in names):
            raise ValueError(
                f"`{caller}`: the pattern {pattern!r} matches no leaf. Patterns are"
                " regular expressions for a whole path, so 'encoder/.*' means all that"
                f" is in the encoder. The leaves are {listed(names)}."
            )
    winners = [
        next((p for p, e in compiled.items() if e.fullmatch(name)), None)
        for name in names
    ]
    for pattern in patterns:
        if pattern not in winners:
            raise ValueError(
                f"`{caller}`: every leaf that the pattern {pattern!r} matches is taken"
                " by a pattern before it. The first that matches counts: put the"
                " narrower one first, or leave it out."
            )
    return [None if p is None else patterns[p] for p in winners]


def per_leaf(setting: Any, names: Sequence[str], caller: str) -> list:
    """Returns a setting for each leaf: one for all, or `{pattern: setting}`."""
    if isinstance(setting, Mapping):
        return matches(setting, names, caller)
    return [setting] * len(names)


def labels(groups: Any, names: Sequence[str], treedef: Any, caller: str) -> list:
    """Returns the label of each leaf, `None` for a leaf that is in no group."""
    if callable(groups):
        return [groups(name) for name in names]
    if is_patterns(groups):
        return matches(groups, names, caller)
    try:
        return treedef.flatten_up_to(groups)
    except ValueError as error:
        raise ValueError(
            f"`{caller}` must be {{pattern: label}}, a function of a leaf's name, or a"
            f" tree of labels like the tree itself, got {groups!r}."
        ) from error


def is_patterns(groups: Any) -> TypeGuard[Mapping[str, str]]:
    """Whether groups are given as `{pattern: label}`."""
    return isinstance(groups, Mapping) and all(
        isinstance(label, str) for label in groups.values()
    )


def _compile(pattern: str, caller: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{caller}`: {pattern!r} is not a regular expression ({error}). To match"
            " every leaf write '.*'."
        ) from error


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
