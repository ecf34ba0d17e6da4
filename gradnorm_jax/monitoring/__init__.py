"""The host's side: records of a run, what they say, and what they look like."""

from gradnorm_jax.monitoring.archive import load
from gradnorm_jax.monitoring.diagnosis import (
    CODES,
    DEFAULT_RULES,
    Finding,
    diagnose,
    explain,
)
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.monitor import Monitor
from gradnorm_jax.monitoring.plots import flow, heat_map, norm_trace, save_all
from gradnorm_jax.monitoring.report import report, write
from gradnorm_jax.monitoring.telling import FindingError
from gradnorm_jax.monitoring.writers import as_writer

__all__ = [
    "CODES",
    "DEFAULT_RULES",
    "Finding",
    "FindingError",
    "History",
    "Monitor",
    "as_writer",
    "diagnose",
    "explain",
    "flow",
    "heat_map",
    "load",
    "norm_trace",
    "report",
    "save_all",
    "write",
]
