"""The norm of the gradient of each example, mostly without the gradient."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gradnorm_jax import _sharding
from gradnorm_jax._layout import Layout
from gradnorm_jax._typing import Tree
from gradnorm_jax.norms.examples import (
    Argnums,
    Loss,
    OneExample,
    check_microbatch_size,
    in_microbatches,
)
from gradnorm_jax.norms.fold import accumulator
from gradnorm_jax.norms.granularity import Granularity, check_granularity, whole_tree

if TYPE_CHECKING:  # loaded by whoever traces a loss
    from gradnorm_jax.norms.ghost.programs import Value
    from gradnorm_jax.norms.ghost.tracing import Backward

IMPLEMENTATIONS = ("ghost", "vmap")
_NOTHING: Mapping[int, Value] = types.MappingProxyType({})


def per_example_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    key_argnum: int | None = None,
    has_aux: bool = False,
    batched: bool = False,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    microbatch_size: int | None = None,
    implementation: str | None = None,
) -> Callable[..., Any]:
    r"""Makes a function that returns the norm of the gradient of each example.

    .. math:: n_i = \lVert \nabla_\theta \, L(\theta, x_i) \rVert_2 ,
        \quad i = 1 \dots B

    JAX differentiates the loss of one example, and what it would compute last for each
    parameter, a product of activations and of the gradients of outputs, is not
    computed: its norm follows from what is multiplied. That takes about the time and
    memory of one gradient of the mean loss, where `vmap(grad)` takes the memory of B
    of them. What is not understood is formed as by `vmap`: `explain_norms` says
    which.

    Args:
      loss_fn: `(params, example, ...) -> loss`, the loss of one example, as `jax.grad`
        takes it. Dropout and the like take a key by `key_argnum`.
      argnums: Which arguments the gradient is taken of.
      batch_argnums: Which arguments hold examples along axis 0 of every leaf, as
        `(1, 2)` for `(params, x, y)`; the rest is the same for all.
      key_argnum: Which argument is a PRNG key, split into one for each example.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      batched: Whether `loss_fn` takes a batch: it is given batches of one example.
      granularity: What has one norm: ``whole_tree()``, ``per_leaf()``,
        ``per_group(...)``; the gradients of parts of leaves are formed.
      microbatch_size: How many examples are computed at a time, to save memory; by
        default all.
      implementation: "ghost", the default, or "vmap", which forms all gradients.

    Returns:
      A function of the arguments of `loss_fn` that returns the norms, `[B]`, in float32
      or wider, or `[B, parts]` in the order of `granularity.names(params)`; with
      `has_aux`, `(norms, aux)`.

    Guarantees:
      - Equal to the norms of `jax.vmap(jax.grad(loss_fn))` to 5e-6 in float32. Where
        the products of a leaf cancel by a factor of :math:`\kappa` in their squares,
        the error grows as :math:`\sqrt\kappa`, by the rule "gram" as :math:`\kappa`.
      - Parameters that are used several times, or not at all, are right.
      - An example with a NaN has the norm NaN; those of the others stay as they were,
        but where XLA forms gradients of convolutions for several examples at a time.
      - Right where the squares of a norm leave float32, and the norm does not.
      - Sharded over examples, under `jit` and in `shard_map`, the norms come out
        sharded as the batch is, without any collective of their own.

    Raises:
      ValueError: If a number is out of its range, or arguments contradict one another.
        When called: if the loss is no number, leaves hold different numbers of
        examples, or an argument that is not named has as many entries along axis 0.
      TypeError: When called: if a parameter is of an integer dtype.

    Example:
      >>> loss_fn = lambda w, example: (w @ example["x"] - example["y"]) ** 2 / 2
      >>> batch = {"x": jnp.array([[3.0, 4.0], [0.6, 0.8]]), "y": jnp.array([0.0, 1.0])}
      >>> print(per_example_norms(loss_fn)(jnp.array([1.0, 0.5]), batch))
      [25.  0.]

    References:
      Goodfellow, `Efficient Per-Example Gradient Computations
      <https://arxiv.org/abs/1510.01799>`_, 2015; Li et al., `Large Language Models Can
      Be Strong Differentially Private Learners <https://arxiv.org/abs/2110.05679>`_,
      2022
    """
    compute = _values_and_norms(
        "per_example_norms",
        loss_fn,
        granularity,
        microbatch_size,
        implementation,
        argnums=argnums,
        batch_argnums=batch_argnums,
        key_argnum=key_argnum,
        has_aux=has_aux,
        batched=batched,
    )

    def norms_of_examples(*args: Any, **kwargs: Any) -> Any:
        value, norms = compute(*args, **kwargs)
        return (norms, value[1]) if has_aux else norms

    return norms_of_examples


def value_and_per_example_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    key_argnum: int | None = None,
    has_aux: bool = False,
    batched: bool = False,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    microbatch_size: int | None = None,
    implementation: str | None = None,
) -> Callable[..., Any]:
    """Makes a function that returns the loss and the gradient's norm of each example.

    Args:
      loss_fn: As in :func:`per_example_norms`, and so are the other arguments.
      argnums: Which arguments the gradient is taken of.
      batch_argnums: Which arguments hold examples.
      key_argnum: Which argument is a PRNG key.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      batched: Whether `loss_fn` takes a batch.
      granularity: What has one norm.
      microbatch_size: How many examples are computed at a time.
      implementation: "ghost" or "vmap".

    Returns:
      A function that returns `(losses, norms)`; with `has_aux`,
      `((losses, aux), norms)`.

    Example:
      >>> loss_fn = lambda w, x: (w * x) ** 2
      >>> compute = value_and_per_example_norms(loss_fn)
      >>> losses, norms = compute(1.0, jnp.array([1.0, 3.0]))
      >>> print(losses, norms)
      [1. 9.] [ 2. 18.]
    """
    return _values_and_norms(
        "value_and_per_example_norms",
        loss_fn,
        granularity,
        microbatch_size,
        implementation,
        argnums=argnums,
        batch_argnums=batch_argnums,
        key_argnum=key_argnum,
        has_aux=has_aux,
        batched=batched,
    )


def _values_and_norms(
    caller: str,
    loss_fn: Callable[..., Any],
    granularity: Granularity,
    microbatch_size: int | None,
    implementation: str | None,
    **arguments: Any,
) -> Callable[..., Any]:
    loss = Loss.of(loss_fn, caller=caller, **arguments)
    check_granularity(granularity, caller)
    check_microbatch_size(microbatch_size, caller)
    check_implementation(implementation, IMPLEMENTATIONS, caller)

    def of_batch(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, jax.Array]:
        one = loss.one(args, kwargs)
        layout = granularity.layout(one.params, measured=False)
        way = norms_by_vmap if implementation == "vmap" else norms_by_ghost
        compute = way(one, layout)
        _, (values, pieces) = in_microbatches(
            lambda batch, _: ((), compute(batch)), one.batch, one.size, microbatch_size
        )
        return values, together(layout, pieces, one.size)

    def values_and_norms(*args: Any, **kwargs: Any) -> tuple[Any, jax.Array]:
        return _sharding.split_by_the_compiler(
            of_batch, (args, kwargs), loss.batch(args), lambda of_examples: of_examples
        )

    return values_and_norms


def norms_by_vmap(one: OneExample, layout: Layout) -> Callable[[Tree], Any]:
    """Forms the gradients of all examples: the truth."""

    def compute(batch: Tree) -> tuple[Any, list[jax.Array]]:
        result, grads = jax.vmap(one.value_and_grad, (None, 0))(one.params, batch)
        return result, norms_of_formed(jax.tree.leaves(grads), layout)

    return compute


def norms_by_ghost(one: OneExample, layout: Layout) -> Callable[[Tree], Any]:
    """Forms only those gradients that are no larger than what they are made of."""
    from gradnorm_jax.norms.ghost.tracing import trace

    backward = trace(one)
    norms = norms_of_members(backward, layout)

    def compute(batch: Tree) -> tuple[Any, list[jax.Array]]:
        result, found, _ = backward.run(batch, norms)
        return result, found

    return compute


def norms_of_members(
    backward: Backward, layout: Layout, formed: Mapping[int, Value] = _NOTHING
) -> list[Value]:
    """Adds to a program the norms of all leaves that are measured.

    Args:
      backward: The program.
      layout: Which leaves are measured.
      formed: The gradients of the leaves that are formed anyway.
    """
    from gradnorm_jax.norms.ghost.formulas import norm
    from gradnorm_jax.norms.ghost.leaves import norm_of

    zero = backward.program.add(lambda: jnp.zeros((), jnp.float32))
    found = []
    for i in layout.members:
        if i in formed:
            fun = functools.partial(norm, kept=layout.kept[i])
            value = backward.program.add(fun, formed[i])
        else:
            gradient = backward.gradient[i]
            value = norm_of(gradient, backward.program, layout.kept[i]).value
        found.append(zero if value is None else value)
    return found


def norms_of_formed(grads: Sequence[jax.Array], layout: Layout) -> list[jax.Array]:
    """Returns the norms of the cells of each member of gradients `[B, ...]`."""
    from gradnorm_jax.norms.ghost.formulas import norm

    return [
        jax.vmap(functools.partial(norm, kept=layout.kept[i]))(grads[i])
        for i in layout.members
    ]


def together(layout: Layout, norms: Sequence[jax.Array], size: int) -> jax.Array:
    """Folds the norms of pieces of each member, `[B, ...]`, into those of its parts.

    Returns `[B]` for one part, else `[B, parts]`. A norm of norms is the norm of all.
    """
    pieces = [x.reshape(size, -1) for x in norms]
    if layout.fold == "all":
        return _fold(pieces, size)
    if layout.fold == "each":
        owners = list(range(len(pieces)))
        alone = [bool(layout.kept[i]) for i in layout.members]
    else:
        owners = [layout.measured[i] for i in layout.members]
        alone = [False] * len(layout.labels)
    parts = []
    for part in range(len(alone)):
        own = [x for owner, x in zip(owners, pieces, strict=True) if owner == part]
        parts.append(own[0] if alone[part] else _fold(own, size)[:, None])
    return jnp.concatenate(parts, axis=1)


def _fold(norms: Sequence[jax.Array], size: int) -> jax.Array:
    from gradnorm_jax.norms.ghost.formulas import norm

    dtype = accumulator(norms)
    pieces = [jnp.zeros((size, 0), dtype), *(x.astype(dtype) for x in norms)]
    return norm(jnp.concatenate(pieces, axis=1), kept=(0,))


def check_implementation(
    implementation: str | None, known: tuple[str, ...], caller: str
) -> None:
    """Refuses the name of what is not implemented."""
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"`{caller}(implementation=...)` must be one of {known}, got"
            f" {implementation!r}. `None` takes {known[0]!r}."
        )


__all__ = ["per_example_norms", "value_and_per_example_norms"]
