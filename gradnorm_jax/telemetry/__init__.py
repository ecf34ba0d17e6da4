"""RECORD: what a clip and a watch keep in the optimizer's state, found and named."""

from gradnorm_jax._typing import DETAILS, KINDS
from gradnorm_jax.telemetry.naming import (
    EXTRAS,
    SCALARS,
    columns,
    columns_of,
    find,
    layout,
    scalars,
)
from gradnorm_jax.telemetry.states import (
    ClipMetrics,
    ClipState,
    Columns,
    SkipMetrics,
    SkipState,
    Stats,
    WatchState,
)

__all__ = [
    "DETAILS",
    "EXTRAS",
    "KINDS",
    "SCALARS",
    "ClipMetrics",
    "ClipState",
    "Columns",
    "SkipMetrics",
    "SkipState",
    "Stats",
    "WatchState",
    "columns",
    "columns_of",
    "find",
    "layout",
    "scalars",
]
