"""Tests of the rules that look through a run."""
