"""Norms of gradients that are never formed: the backward pass without its last step.

JAX differentiates the loss of one example; what it would do last for each leaf is read
from the program that it wrote, and not run. The norm comes from what was to be
multiplied.
"""
