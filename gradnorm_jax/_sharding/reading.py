"""What JAX's types say of how a tree lies on a mesh, and what they leave open.

Under `jit`, eagerly and under `vmap` an array is the whole array, and its norm needs no
help. Inside `shard_map` it is the shard of one device, and its type names the mesh axes
along which the shards differ. This is the one place that reads these types.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gradnorm_jax import _trees
from gradnorm_jax._sharding.collective import Axes, ways
from gradnorm_jax._typing import AUTO, Auto, AxisNames, Tree


class DistributedNormError(ValueError):
    """A norm that would be wrong, because it cannot be known how a leaf is sharded."""


class Placement(NamedTuple):
    """What a user says of how a tree lies on the mesh.

    Attributes:
      axis_names: The mesh axes to reduce over; `AUTO` for those that the types name.
      specs: A prefix of the tree, of PartitionSpecs; `None` where it is not said.
      caller: What errors call the one who asks.
    """

    axis_names: AxisNames = AUTO
    specs: Tree | None = None
    caller: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """How one leaf is split over the mesh.

    Attributes:
      axes: The mesh axes over which to reduce what each device has of it.
      dims: For each dimension, those of `axes` along which it is cut; `None` where that
        is not known.
      ways: Into how many shards it is split.
    """

    axes: Axes
    dims: tuple[Axes, ...] | None
    ways: int

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole leaf, of which a shard has `shape`."""
        dims = self.dims or ((),) * len(shape)
        return tuple(n * ways(axes) for n, axes in zip(shape, dims, strict=True))

    def without_the_first_dimension(self) -> "Split":
        """How an entry of the first dimension is split, as far as it is known."""
        if not self.dims:
            return self
        axes = tuple(a for a in self.axes if a not in self.dims[0])
        return _split(axes, ((), *self.dims[1:]))


def splits(
    tree: Tree,
    names: Sequence[str],
    leaves: Sequence[Any],
    placement: Placement,
    caller: str,
    *,
    measured: bool = True,
) -> tuple[Split, ...]:
    """Decides over which mesh axes each leaf is split; `()` where all are whole.

    With `measured=False` no norm is about to be taken: an axis that is not bound, a sum
    that is pending and types that are not tracked are no errors then.
    """
    caller = placement.caller or caller
    wanted = _wanted(placement.axis_names, caller)
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    mapped = ()
    if measured:
        for name, x in zip(names, leaves, strict=True):
            _check_reduced(x, name, caller)
        mapped = _mapped(wanted, manual, caller)
    if not manual:
        return tuple(_split(mapped, ((),) * x.ndim) for x in leaves) if mapped else ()

    cuts: list[tuple[Axes, ...] | None] = [None] * len(leaves)
    if placement.specs is not None:
        cuts = [
            _cut(spec, x, manual, name, caller)
            for spec, x, name in zip(
                _each_spec(placement.specs, tree, names, caller),
                leaves,
                names,
                strict=True,
            )
        ]
    untracked = _untracked(manual)
    if not untracked:
        axes = [ordered(manual, varying(x)) for x in leaves]
        _check_agrees(names, axes, cuts, caller)
    elif placement.specs is not None:
        axes = [ordered(manual, *(cut or ())) for cut in cuts]
    elif wanted is not AUTO:
        axes = [ordered(manual, wanted)] * len(leaves)
    elif measured and leaves:
        raise DistributedNormError(_untracked_message(untracked, names, caller))
    else:
        return ()
    found = tuple(
        _limited(own, cut, wanted, mapped, x.ndim)
        for own, cut, x in zip(axes, cuts, leaves, strict=True)
    )
    return found if any(split.axes for split in found) else ()


def check_averaged(
    names: Sequence[str],
    leaves: Sequence[Any],
    params: Tree | None,
    placement: Placement,
) -> None:
    """Refuses gradients that differ where their parameters are replicated."""
    if params is None or not is_manual():
        return
    caller = placement.caller
    wanted = _wanted(placement.axis_names, caller)
    named = zip(_trees.leaf_names(params), jax.tree.leaves(params), strict=True)
    types = {name: varying(x) for name, x in named if hasattr(x, "dtype")}
    for name, x in zip(names, leaves, strict=True):
        over = varying(x) if wanted is AUTO else varying(x) & set(wanted)
        if extra := tuple(sorted(over - types.get(name, over))):
            raise DistributedNormError(
                f"`{caller}`: gradient {name!r} differs across mesh axes {extra}, but"
                " its parameter is the same there. A gradient of a loss on one device"
                " has to be averaged first: take the mean inside the loss that is"
                f" differentiated, or `jax.lax.pmean(grads, {extra})`. One that was"
                " gathered needs `jax.lax.all_gather(..., to='invarying')`. To clip the"
                " gradient of each device by its own norm, give `axis_names=()`."
            )


def check_cut_is_known(split: Split, name: str, caller: str) -> None:
    """Refuses a leaf whose parts depend on which of its dimensions are split."""
    if split.dims is None:
        raise DistributedNormError(
            f"`{caller}`: leaf {name!r} is split over mesh axes {split.axes}, but its"
            " type does not say along which dimensions, on which the norms of its parts"
            " depend. Give `specs=...`, the PartitionSpec of each leaf that `shard_map`"
            " was given, or `axis_names=()` for norms of what one device holds."
        )


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array may differ, as its type says."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def is_manual() -> bool:
    """Whether this is inside of `shard_map`, where arrays are those of one device."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def is_on_one_device(x: Any) -> bool:
    """Whether an array is on no mesh; known of a traced array too."""
    return jax.typeof(x).sharding.mesh.empty


def _limited(
    axes: Axes,
    cut: tuple[Axes, ...] | None,
    wanted: Auto | Axes,
    mapped: Axes,
    rank: int,
) -> Split:
    """How a leaf is split over those axes that are asked for."""
    if wanted is not AUTO:
        axes = tuple(a for a in axes if a in wanted)
    if cut is None:
        return _split((*mapped, *axes), None if axes else ((),) * rank)
    cut = tuple(tuple(a for a in along if a in axes) for along in cut)
    return _split((*mapped, *axes), cut)


def _split(axes: Axes, dims: tuple[Axes, ...] | None) -> Split:
    return Split(axes, dims, ways(axes))


def _wanted(axis_names: AxisNames, caller: str) -> Auto | Axes:
    if axis_names is AUTO:
        return axis_names
    if isinstance(axis_names, str):
        return (axis_names,)
    if isinstance(axis_names, tuple | list | set | frozenset) and all(
        isinstance(axis, str) for axis in axis_names
    ):
        return tuple(axis_names)
    raise TypeError(
        f"`{caller}`: `axis_names` must be `AUTO` or a tuple of names of mesh axes, got"
        f" {axis_names!r}. `()` is for none; a `jax.P(...)` belongs into `specs`."
    )


def _mapped(wanted: Auto | Axes, manual: Axes, caller: str) -> Axes:
    """The axes of `jax.vmap` among those that are asked for."""
    mapped = () if wanted is AUTO else tuple(a for a in wanted if a not in manual)
    for axis in mapped:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise DistributedNormError(
                f"`{caller}`: axis_names={wanted}, but no axis {axis!r} is bound here,"
                f" where the manual mesh axes are {manual}. Under `jax.jit` the"
                " gradients of all devices are one array already: drop `axis_names`."
            ) from None
    if mapped and any(axis in varying(jax.lax.axis_index(axis)) for axis in manual):
        raise DistributedNormError(
            f"`{caller}`: axis_names={wanted} names {mapped} of `jax.vmap`, over which"
            " JAX cannot reduce inside of `jax.shard_map`, unless that has"
            " `check_vma=False`. Map outside of it, or leave the axis out."
        )
    return mapped


def _untracked(manual: Axes) -> Axes:
    """The manual axes, longer than 1, of which types say nothing.

    The index of a device differs along its axis, by construction: a type that does not
    say so says nothing.
    """
    return tuple(
        axis
        for axis in manual
        if jax.lax.axis_size(axis) > 1 and axis not in varying(jax.lax.axis_index(axis))
    )


def _untracked_message(untracked: Axes, names: Sequence[str], caller: str) -> str:
    return (
        f"`{caller}`: mesh axes {untracked} are manual here, but JAX does not track"
        " which arrays differ across them (`jax.shard_map(..., check_vma=False)` or"
        f" `jax.pmap`), so that the leaves {_trees.listed(names)} may be split over"
        " them or be the same on every device. Use `jax.shard_map` with"
        " `check_vma=True`. Or say so: `axis_names=()` if all leaves are reduced and"
        f" the same everywhere, `axis_names={untracked}` if each is split over all of"
        " these axes, `specs=...` with the PartitionSpec of each leaf."
    )


def _check_reduced(x: Any, name: str, caller: str) -> None:
    kind = jax.typeof(x)
    pending = set(kind.manual_axis_type.unreduced)
    pending |= set(getattr(kind.sharding.spec, "unreduced", ()))
    if pending:
        axes = tuple(sorted(pending))
        raise DistributedNormError(
            f"`{caller}`: leaf {name!r} is unreduced over {axes}: the sum over these"
            f" mesh axes is still to be taken. Take it first, by `jax.lax.psum(grads,"
            f" {axes})` inside `shard_map`, by `jax.reshard` outside."
        )


def _each_spec(
    specs: Tree, tree: Tree, names: Sequence[str], caller: str
) -> list[jax.P]:
    """The spec of each leaf: its own, or that of the branch that it is in."""
    is_spec = lambda x: isinstance(x, jax.P)  # noqa: E731
    known = dict(jax.tree.leaves_with_path(specs, is_leaf=is_spec))
    for spec in known.values():
        if not is_spec(spec):
            raise TypeError(
                f"`{caller}`: `specs` must be a tree of `jax.P(...)`, as `in_specs` of"
                f" `jax.shard_map` is, got {spec!r}."
            )
    found = []
    for name, (path, _) in zip(names, jax.tree.leaves_with_path(tree), strict=True):
        branches = (path[:n] for n in range(len(path), -1, -1))
        spec = next((known[branch] for branch in branches if branch in known), None)
        if spec is None:
            raise ValueError(
                f"`{caller}`: `specs` says nothing of leaf {name!r}. It must be a"
                " prefix of the tree of gradients: a `jax.P(...)` for each leaf, or"
                " for a branch; `jax.P()` for what is not split."
            )
        found.append(spec)
    return found


def _cut(
    spec: jax.P, x: jax.Array, manual: Axes, name: str, caller: str
) -> tuple[Axes, ...]:
    """The manual axes along which a spec cuts each dimension of a leaf."""
    if len(spec) > x.ndim:
        raise ValueError(
            f"`{caller}`: `specs` says {spec} of leaf {name!r}, which has only {x.ndim}"
            " dimensions."
        )
    parts = [(a,) if isinstance(a, str) else tuple(a or ()) for a in spec]
    known = jax.sharding.get_abstract_mesh().axis_names
    if unknown := tuple(a for axes in parts for a in axes if a not in known):
        raise ValueError(
            f"`{caller}`: `specs` says {spec} of leaf {name!r}, but {unknown} is no"
            f" axis of this mesh, whose axes are {known}."
        )
    parts += [()] * (x.ndim - len(parts))
    return tuple(tuple(a for a in axes if a in manual) for axes in parts)


def _check_agrees(
    names: Sequence[str],
    axes: Sequence[Axes],
    cuts: Sequence[tuple[Axes, ...] | None],
    caller: str,
) -> None:
    """Refuses specs that say something else than the types."""
    for name, own, cut in zip(names, axes, cuts, strict=True):
        if cut is None:
            continue
        said = tuple(axis for along in cut for axis in along)
        if any(jax.lax.axis_size(a) > 1 for a in set(own) ^ set(said)):
            raise DistributedNormError(
                f"`{caller}`: `specs` says that leaf {name!r} is split over {said}, but"
                f" it varies over {own}. Give the spec by which it came into"
                " `shard_map`; a gradient that is not averaged yet varies over more"
                " than that."
            )


def ordered(manual: Axes, *axes: Any) -> Axes:
    """Those of some axes that are manual, in the order of the mesh."""
    named = set().union(*axes)
    return tuple(axis for axis in manual if axis in named)
