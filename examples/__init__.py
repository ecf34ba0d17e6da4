"""Experiments that show what clipping does; see README.md in this folder."""
