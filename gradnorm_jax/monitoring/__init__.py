"""The host's side: records of a run on disk, and what they look like."""

from gradnorm_jax.monitoring.archive import load
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.plots import flow, heat_map, norm_trace, save_all
from gradnorm_jax.monitoring.records import Monitor
from gradnorm_jax.monitoring.report import report, write

__all__ = [
    "History",
    "Monitor",
    "flow",
    "heat_map",
    "load",
    "norm_trace",
    "report",
    "save_all",
    "write",
]
