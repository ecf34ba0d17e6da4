"""The shared words: what the signatures of this package speak of."""

import enum
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax

#: Any pytree of arrays. `None` and `optax.MaskedNode` hold no leaf and pass by.
Tree = Any
#: One order of a norm: a number p >= 1, `inf`, or the word "rms".
Ord = float | str
#: What tells the groups of a tree: `{pattern: label}`, `name -> label`, or labels.
Groups = Mapping[str, str] | Callable[[str], Hashable] | Tree
Axis = int | tuple[int, ...]
#: One value for every leaf, or `{pattern: value}` for the leaves it names.
PerLeaf = Axis | Mapping[str, Axis]
#: A number that is known, or one that is traced.
Scalar = float | jax.Array


class Auto(enum.Enum):
    """The type of `AUTO`."""

    AUTO = "AUTO"

    def __repr__(self) -> str:
        return self.value


#: Reduce over the mesh axes that JAX's types name.
AUTO = Auto.AUTO
#: The mesh axes to reduce over: `AUTO`, or their names.
AxisNames = Auto | str | tuple[str, ...]

#: The norms that a record holds by default, in the order of its columns.
KINDS = ("grad", "update", "param")
#: What it holds of the gradients on request: the largest absolute value, and how many
#: entries are exactly 0, NaN or infinite.
DETAILS = ("grad_max", "grad_zeros", "grad_nonfinite")


class Bound(NamedTuple):
    """How large a norm may be.

    Attributes:
      limit: The largest norm that passes as it is; infinity where none is clipped.
      center: What a rule pulls larger norms toward; 0 except for rules with a trigger
        above their target.
      floor: What a rule raises smaller norms to; 0 except for rules with a band.
    """

    limit: jax.Array
    center: jax.Array | float = 0.0
    floor: jax.Array | float = 0.0
