"""Streams of norms, 1000 steps each, and how clips are led along them."""

import jax
import numpy as np

STEPS = 1000


def at(steps, factor):
    """Returns what makes a norm `factor` times as large at some steps."""
    out = np.ones(STEPS)
    out[steps] = factor
    return out


def since(step, factor):
    return np.where(np.arange(STEPS) < step, 1.0, factor)


def growth(rate):
    return (1 + rate) ** np.arange(STEPS)


EVENTS = {
    "calm": 1,
    "spikes": at([40, 300, 301, 700], 100),
    "bursts": at([*range(200, 210), *range(600, 610)], 30),
    "rise_3": since(400, 3),
    "rise_10": since(400, 10),
    "fall_3": since(400, 1 / 3),
    "fall_10": since(400, 1 / 10),
    "slow_growth": growth(0.001),
    "fast_growth": growth(0.005),
    "zeros": at([0, 3, 60, 61, 150, *range(500, 800)], 0),
    "nonfinite": at([0, 5, 100, 101, 600], np.nan) * at([2, 30, 400], np.inf),
    "tiny": 1e-25,
    "huge": 1e25,
    "far_apart": at([150, 151], 1e25) * at([300, 700], 1e-25),
}


def stream(event, *, seed, sigma=0.15):
    """Returns lognormal norms around 1, to which something happens, in float32."""
    usual = np.random.default_rng(seed).lognormal(0.0, sigma, STEPS)
    return (usual * EVENTS[event]).astype(np.float32)


ALL = {event: stream(event, seed=seed) for seed, event in enumerate(EVENTS)}


def leader(clips):
    """Returns a compiled function that leads clips along streams of gradients.

    `clips` is {name: clip}: one compilation serves them all. The function takes a tree
    of arrays (streams, steps, ...), and returns {name: (the tree that came out, the
    limits)}.
    """

    def step(states, grads):
        led = {name: clip.update(grads, states[name]) for name, clip in clips.items()}
        seen = {name: (out, state.metrics.limits) for name, (out, state) in led.items()}
        return {name: state for name, (_, state) in led.items()}, seen

    def along(stream):
        first = jax.tree.map(lambda x: x[0], stream)
        states = {name: clip.init(first) for name, clip in clips.items()}
        return jax.lax.scan(step, states, stream)[1]

    return jax.jit(jax.vmap(along))
