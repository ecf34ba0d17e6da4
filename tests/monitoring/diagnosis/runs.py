"""Runs that never were: calm ones, with the fault that a test puts in."""

import numpy as np

from gradnorm_jax.monitoring import History

SIZES = {"grad": 1.0, "update": 1e-3, "param": 1.0}


def calm(
    steps=300,
    parts=6,
    *,
    kinds=("grad", "update", "param"),
    edit=lambda norms: None,
    limit=None,
    scalars=None,
    first=0,
    noise=0.1,
    sizes=None,
    dims=2,
    names="block_{}/kernel",
):
    """A run without findings.

    `edit` changes the norms, a dictionary of arrays [steps, parts], in place. `limit`
    is that of a clip of the global norm, for each step or all. `scalars` replace those
    that follow from the rest.
    """
    random = np.random.default_rng(0)
    norms = {
        kind: SIZES[kind] * np.exp(noise * random.normal(size=(steps, parts)))
        for kind in kinds
    }
    edit(norms)
    columns = [f"{kind}/{names.format(i)}" for kind in norms for i in range(parts)]
    values = {"loss": np.ones(steps)}
    if limit is not None:
        limit = np.broadcast_to(np.float64(limit), steps)
        total = np.sqrt(np.square(norms["grad"]).sum(axis=1))
        values |= {
            "clip/limit": limit,
            "clip/scale": 1 / np.maximum(total / limit, 1),
            "clip/fraction": total > limit,
        }
    values |= scalars or {}
    values = {name: np.broadcast_to(x, steps) for name, x in values.items()}
    rows = np.concatenate(
        [*norms.values(), np.stack(list(values.values()), axis=1)], axis=1
    )
    return History.from_rows(
        [*columns, *values],
        np.arange(first, first + steps),
        rows,
        sizes=sizes,
        dims=[dims] * parts * bool(kinds) if isinstance(dims, int) else dims,
    )


def times(kind, where, factor):
    """An edit that multiplies some norms of one kind."""

    def edit(norms):
        norms[kind][where] *= factor

    return edit


def codes(findings):
    """The codes of findings, in their order."""
    return [finding.code for finding in findings]
