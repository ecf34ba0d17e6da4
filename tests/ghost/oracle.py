"""The truth: the gradient of each example by itself, in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..references.norms import wide

#: To compile such small programs takes longer than to run them.
QUICKLY = {"xla_backend_optimization_level": 0}


class Model(NamedTuple):
    """A loss of one example, and what it is of.

    Attributes:
      loss_fn: `(params, example) -> loss`.
      params: A tree of arrays.
      batch: A tree of arrays with the examples along axis 0, at least one of them of
        floats.
      exact: The same loss, written plainly: without rounding to 16 bits, and in a way
        that others share. `None` where that is `loss_fn` itself.
      rounds: Whether the loss or the parameters round to 16 bits.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    exact: Callable[..., Any] | None = None
    rounds: bool = False

    @property
    def size(self):
        """How many examples there are."""
        return len(jax.tree.leaves(self.batch)[0])

    @property
    def names(self):
        """The path of each leaf."""
        paths, _ = jax.tree.flatten_with_path(self.params)
        keystr = jax.tree_util.keystr
        return [keystr(path, simple=True, separator="/") for path, _ in paths]


class Measured(NamedTuple):
    """Values [B], the norm of each leaf [B, leaves], and of the whole tree [B]."""

    values: np.ndarray
    leaves: np.ndarray
    whole: np.ndarray


#: Truths by the loss that they are of.
_KNOWN = {}


def in_float64(model):
    """Measures with `vmap(grad)` in float64."""
    loss_fn = model.exact or model.loss_fn
    if loss_fn not in _KNOWN:
        with jax.enable_x64(True):
            params, batch = jax.tree.map(widened, (model.params, model.batch))
            _KNOWN[loss_fn] = _measured(loss_fn, params, batch)
    return _KNOWN[loss_fn]


def forget_truths():
    """Lets go of all truths."""
    _KNOWN.clear()


def by_vmap(model):
    """Measures with `vmap(grad)` in the dtypes that the model has."""
    return _measured(model.loss_fn, model.params, model.batch)


def widened(x):
    """Returns floats as float64, complex numbers as complex128, all else as it is."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.asarray(x, jnp.complex128)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x, jnp.float64)
    return x


def norms_of(grads):
    """Returns the norm of each leaf of gradients [B, ...] as [B, leaves]."""
    columns = []
    for leaf in jax.tree.leaves(grads):
        flat = np.abs(wide(leaf)).reshape(len(leaf), -1)
        largest = np.max(flat, axis=1, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1)
        columns.append(unit * np.linalg.norm(flat / unit[:, None], axis=1))
    return np.stack(columns, axis=1)


def _measured(loss_fn, params, batch):
    each = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))
    run = jax.jit(each, compiler_options=QUICKLY)
    values, grads = jax.device_get(run(params, batch))
    leaves = norms_of(grads)
    return Measured(wide(values), leaves, np.linalg.norm(leaves, axis=1))
