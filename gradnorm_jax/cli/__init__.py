"""The command line: `gradnorm demo`, `report`, `watch`, `diagnose`, and so on."""

from gradnorm_jax.cli.program import main

__all__ = ["main"]
