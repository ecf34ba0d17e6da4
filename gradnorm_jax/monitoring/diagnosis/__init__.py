"""What goes wrong in a run: rules over its record, and findings that say what to do."""

from gradnorm_jax.monitoring.diagnosis.breakdown import exploding, nonfinite, spike
from gradnorm_jax.monitoring.diagnosis.clips import clip_always, clip_never
from gradnorm_jax.monitoring.diagnosis.depth import below_eps, imbalance, vanishing
from gradnorm_jax.monitoring.diagnosis.evidence import Rule
from gradnorm_jax.monitoring.diagnosis.examination import DEFAULT_RULES, diagnose
from gradnorm_jax.monitoring.diagnosis.explanations import CODES, explain
from gradnorm_jax.monitoring.diagnosis.finding import LEVELS, Finding
from gradnorm_jax.monitoring.diagnosis.motion import (
    dead,
    frozen,
    param_growth,
    ratio_high,
    ratio_low,
)

__all__ = [
    "CODES",
    "DEFAULT_RULES",
    "LEVELS",
    "Finding",
    "Rule",
    "below_eps",
    "clip_always",
    "clip_never",
    "dead",
    "diagnose",
    "explain",
    "exploding",
    "frozen",
    "imbalance",
    "nonfinite",
    "param_growth",
    "ratio_high",
    "ratio_low",
    "spike",
    "vanishing",
]
