"""A loss and its examples: which arguments are a batch, and what one example is."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from gradnorm_jax import _sharding
from gradnorm_jax._checks import check_steps
from gradnorm_jax._trees import flatten
from gradnorm_jax._typing import Tree

Argnums = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss as a user gives it, and what its arguments are.

    Attributes:
      fun: Of one example; with `batched`, of a batch.
      argnums: Which arguments the gradient is taken of.
      batch_argnums: Which arguments hold the examples along axis 0 of every leaf.
      key_argnum: Which argument is a PRNG key, to be split into one for each example.
      has_aux: Whether `fun` returns `(value, aux)`.
      batched: Whether `fun` takes a batch, and so is given batches of one example.
      caller: What errors call the function that was given `fun`.
    """

    fun: Callable[..., Any]
    argnums: Argnums
    batch_argnums: tuple[int, ...]
    key_argnum: int | None
    has_aux: bool
    batched: bool
    caller: str

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        *,
        argnums: Argnums,
        batch_argnums: Argnums,
        key_argnum: int | None,
        has_aux: bool,
        batched: bool,
        caller: str,
    ) -> "Loss":
        """Returns a loss whose arguments do not contradict one another."""
        if not callable(fun):
            raise TypeError(
                f"`{caller}(loss_fn)` must be a function of the parameters and one"
                f" example, got {fun!r}."
            )
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        batch = (
            (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
        )
        keys = () if key_argnum is None else (key_argnum,)
        named = [*chosen, *batch, *keys]
        counted = all(isinstance(k, int) and k >= 0 for k in named)
        if not (counted and chosen and batch) or len(set(named)) < len(named):
            raise ValueError(
                f"`{caller}(argnums={argnums!r}, batch_argnums={batch_argnums!r},"
                f" key_argnum={key_argnum!r})` must name different positions from 0 on,"
                " at least one of parameters and one of examples."
            )
        own = argnums if isinstance(argnums, int) else chosen
        return cls(fun, own, batch, key_argnum, has_aux, batched, caller)

    def params(self, args: Sequence[Any]) -> Tree:
        """Returns what the gradient is taken of."""
        if isinstance(self.argnums, int):
            return args[self.argnums]
        return tuple(args[k] for k in self.argnums)

    def batch(self, args: Sequence[Any]) -> Tree:
        """Returns the arguments with examples along axis 0."""
        last = max([*_tuple(self.argnums), *self.batch_argnums, self.key_argnum or 0])
        if last >= len(args):
            raise TypeError(
                f"`{self.caller}(loss_fn)(...)` needs at least {last + 1} arguments by"
                f" position, got {len(args)}: `argnums`, `batch_argnums` and"
                " `key_argnum` count them."
            )
        return {k: args[k] for k in self.batch_argnums}

    def one(self, args: Sequence[Any], kwargs: dict[str, Any]) -> "OneExample":
        """Returns the loss as a function of one example, and the examples."""
        batch = self.batch(args)
        size = self._size(batch)
        self._refuse_unnamed(args, kwargs, size)
        if self.key_argnum is not None:
            batch[self.key_argnum] = jax.random.split(args[self.key_argnum], size)
        params = _sharding.varying_like(self.params(args), batch)

        def loss(params: Tree, example: dict[int, Any]) -> Any:
            own = list(args)
            chosen = (params,) if isinstance(self.argnums, int) else params
            for k, value in zip(_tuple(self.argnums), chosen, strict=True):
                own[k] = value
            for k, value in example.items():
                is_key = k == self.key_argnum
                own[k] = value if is_key or not self.batched else _batch_of_one(value)
            return self.fun(*own, **kwargs)

        self._check(loss, params, batch)
        value_and_grad = jax.value_and_grad(loss, has_aux=self.has_aux)
        return OneExample(loss, value_and_grad, params, batch, size, self.has_aux)

    def _size(self, batch: Tree) -> int:
        leaves = jax.tree.leaves(batch)
        sizes = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in leaves}
        if len(sizes) != 1 or 0 in sizes:
            shapes = [jnp.shape(x) for x in leaves]
            raise ValueError(
                f"`{self.caller}(batch_argnums={self.batch_argnums})`: every leaf of"
                " the batch needs the same number of examples, at least one, along its"
                f" axis 0, got the shapes {shapes}."
            )
        return sizes.pop()

    def _refuse_unnamed(
        self, args: Sequence[Any], kwargs: dict[str, Any], size: int
    ) -> None:
        """Refuses what looks like one entry for each example, and would go to all."""
        named = {*_tuple(self.argnums), *self.batch_argnums, self.key_argnum}
        rest = {k: x for k, x in enumerate(args) if k not in named} | kwargs
        for k, value in rest.items():
            leaves = [x for x in jax.tree.leaves(value) if hasattr(x, "shape")]
            if size > 1 and leaves and all(x.shape[:1] == (size,) for x in leaves):
                both = (*self.batch_argnums, k)
                way_out = "it by position" if isinstance(k, str) else f"{both} there"
                raise ValueError(
                    f"`{self.caller}(batch_argnums={self.batch_argnums})`: argument"
                    f" {k!r} has {size} entries along axis 0 as the batch has, and each"
                    f" example would be given all of them. Give {way_out} if it holds"
                    " examples; if it is the same for all, put it into `loss_fn` by"
                    " `functools.partial`."
                )

    def _check(self, loss: Callable[..., Any], params: Tree, batch: Tree) -> None:
        flatten(params, f"{self.caller}(argnums={self.argnums})")
        example = jax.tree.map(first, batch)
        result = jax.eval_shape(loss, params, example)
        is_pair = isinstance(result, tuple) and len(result) == 2
        value = result[0] if self.has_aux and is_pair else result
        is_number = isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()
        if not is_number or (self.has_aux and not is_pair):
            wrong = getattr(value, "shape", value)
            if self.has_aux and not is_pair:
                wrong = "no pair"
            raise ValueError(
                f"`{self.caller}(loss_fn)` must return one number for one example"
                f"{', and `aux`' if self.has_aux else ''}, got {wrong}. A loss of a"
                " batch needs `batched=True` and must return its mean or sum; one"
                " that returns more needs `has_aux=True`."
            )


@dataclasses.dataclass(frozen=True)
class OneExample:
    """The value and the gradient of one example, and the examples.

    Attributes:
      loss: `(params, example) -> value`, or with `has_aux` `(value, aux)`.
      value_and_grad: `(params, example) -> (value, gradient)`, or with `has_aux`
        `((value, aux), gradient)`.
      params: What the gradient is taken of.
      batch: A tree with the examples along axis 0.
      size: How many there are.
      has_aux: Whether there is something beside the value.
    """

    loss: Callable[[Tree, Tree], Any]
    value_and_grad: Callable[[Tree, Tree], tuple[Any, Tree]]
    params: Tree
    batch: Tree
    size: int
    has_aux: bool


def check_microbatch_size(microbatch_size: int | None, caller: str) -> None:
    """Refuses a number of examples at a time that is no whole number above 0."""
    if microbatch_size is not None:
        check_steps(
            microbatch_size,
            1,
            f"{caller}(microbatch_size=...)",
            "Leave it out for the default.",
        )


def in_microbatches(
    fun: Callable[[Tree, jax.Array], tuple[Tree, Tree]],
    batch: Tree,
    size: int,
    microbatch_size: int | None,
) -> tuple[Tree, Tree]:
    """Computes sums over examples, and what each example has, some at a time.

    A microbatch takes its examples at even distances, so that on a mesh it has as many
    of each device as any other. The last ones may be there twice to fill it.

    Args:
      fun: `(examples, which of them count) -> (sums, what each has)`.
      batch: All examples.
      size: How many there are.
      microbatch_size: How many are computed at a time; `None` for all.
    """
    if microbatch_size is None or microbatch_size >= size:
        return fun(batch, jnp.ones(size, bool))
    rounds = math.ceil(size / microbatch_size)
    chunks = dealt(batch, size, rounds)
    fun = jax.jit(fun, inline=True)  # traced once for its shapes and for the loop
    sums, _ = jax.eval_shape(fun, *jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

    def step(totals: Tree, own: tuple) -> tuple[Tree, Tree]:
        sums, each = fun(*own)
        return jax.tree.map(jnp.add, totals, sums), each

    start = _sharding.varying_like(zeros, batch)
    totals, each = jax.lax.scan(step, start, chunks)
    return totals, gathered(each, size)


def dealt(batch: Tree, size: int, rounds: int) -> tuple[Tree, jax.Array]:
    """Deals examples out to microbatches, `[rounds, microbatch_size, ...]`.

    Returns them with which of them are real: the last ones may be there twice.
    """
    count = math.ceil(size / rounds) * rounds
    real = _dealt(jnp.arange(count) < size, rounds)
    return jax.tree.map(lambda x: _dealt(x, rounds), batch), real


def gathered(tree: Tree, size: int) -> Tree:
    """Undoes `dealt`."""
    return jax.tree.map(lambda x: _gathered(x, size), tree)


def first(x: jax.Array) -> jax.Array:
    """Returns the first example, which no other device needs to be asked for."""
    sharding = jax.typeof(x).sharding
    if x.ndim and sharding.spec and sharding.spec[0] is not None:
        spec = jax.P(None, *sharding.spec[1:])
        x = jax.reshard(x, jax.NamedSharding(sharding.mesh, spec))
    return x[0]


def in_turn(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function of one example that `vmap` runs for one after the other.

    On several devices it runs for as many at a time, so that each has work of its own.
    """
    one = custom_vmap(fun)

    @one.def_vmap
    def _(size: int, batched: list[bool], *args: Any) -> tuple[jax.Array, bool]:
        slices = [x for x, varies in zip(args, batched, strict=True) if varies]
        of_some = jax.vmap(_with_the_rest(fun, batched, args))
        chunks, _ = dealt(slices, size, _rounds(size))
        return gathered(jax.lax.map(lambda own: of_some(*own), chunks), size), True

    return one


def sum_in_turn(
    fun: Callable[..., jax.Array], batched: Sequence[bool], *args: jax.Array
) -> jax.Array:
    """Returns the sum of a function of one example, one after the other as `in_turn`.

    Args:
      fun: Of one example.
      batched: Which arguments have a leading axis of examples.
      *args: The arguments of all examples.
    """
    slices = [x for x, varies in zip(args, batched, strict=True) if varies]
    size = len(slices[0])
    rounds = _rounds(size)
    of_some = jax.vmap(_with_the_rest(fun, batched, args))
    chunks, real = dealt(slices, size, rounds)
    shape = jax.eval_shape(of_some, *(x[0] for x in chunks))
    zeros = jnp.zeros(shape.shape, shape.dtype)

    def add(total: jax.Array, one: tuple) -> tuple[jax.Array, None]:
        is_real, own = one
        found = of_some(*own)
        keep = is_real.reshape(-1, *[1] * (found.ndim - 1))
        return total + jnp.where(keep, found, jnp.zeros((), found.dtype)), None

    start = _sharding.varying_like(zeros, slices)
    return jnp.sum(jax.lax.scan(add, start, (real, chunks))[0], axis=0)


def _with_the_rest(
    fun: Callable[..., jax.Array], batched: Sequence[bool], args: Sequence[Any]
) -> Callable[..., jax.Array]:
    """Returns a function of only those arguments that differ between examples."""

    def of_one(*slices: Any) -> jax.Array:
        rest = iter(slices)
        return fun(
            *(next(rest) if k else x for k, x in zip(batched, args, strict=True))
        )

    return of_one


def _rounds(size: int) -> int:
    at_a_time = 1 if _sharding.is_manual() else jax.device_count()
    return max(1, size // at_a_time)


def _dealt(x: jax.Array, rounds: int) -> jax.Array:
    missing = -x.shape[0] % rounds
    if missing:
        x = jnp.concatenate([x, x[-missing:]])
    at_a_time = len(x) // rounds
    return jnp.swapaxes(x.reshape(at_a_time, rounds, *x.shape[1:]), 0, 1)


def _gathered(x: jax.Array, size: int) -> jax.Array:
    count = x.shape[0] * x.shape[1]
    return jnp.swapaxes(x, 0, 1).reshape(count, *x.shape[2:])[:size]


def _batch_of_one(example: Tree) -> Tree:
    return jax.tree.map(lambda x: x[None], example)


def _tuple(argnums: Argnums) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else argnums
