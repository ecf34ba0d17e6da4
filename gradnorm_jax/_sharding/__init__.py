"""How a tree lies on a mesh, and what follows from it."""

from gradnorm_jax._sharding.collective import (
    Axes,
    all_reduce,
    in_place,
    own_block,
    ways,
)
from gradnorm_jax._sharding.placing import (
    placed,
    placed_like,
    replicated,
    split_by_the_compiler,
    spread_like,
    varied,
    varying_like,
)
from gradnorm_jax._sharding.reading import (
    DistributedNormError,
    Placement,
    Split,
    check_averaged,
    check_cut_is_known,
    is_manual,
    is_on_one_device,
    splits,
)

__all__ = [
    "Axes",
    "DistributedNormError",
    "Placement",
    "Split",
    "all_reduce",
    "check_averaged",
    "check_cut_is_known",
    "in_place",
    "is_manual",
    "is_on_one_device",
    "own_block",
    "placed",
    "placed_like",
    "replicated",
    "split_by_the_compiler",
    "splits",
    "spread_like",
    "varied",
    "varying_like",
    "ways",
]
