"""Oracles in float64 NumPy, written from the formulas and from nothing else."""
