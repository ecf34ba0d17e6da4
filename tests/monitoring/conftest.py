"""Runs that never were: rows of norms with the faults that a report must show."""

import numpy as np
import pytest

from gradnorm_jax.monitoring import History

KINDS = ("grad", "update", "param")


@pytest.fixture
def make():
    """Returns a function that makes a history of log-normal norms."""

    def history(parts=4, steps=50, *, kinds=KINDS, limit=1.0, edit=lambda norms: None):
        random = np.random.default_rng(0)
        names = [f"block_{i}/kernel" for i in range(parts)]
        norms = {
            kind: np.exp(random.normal(size=(steps, parts))) * size
            for kind, size in zip(kinds, (1.0, 1e-3, 2.0), strict=False)
        }
        edit(norms)
        scalars = np.full((steps, 4), np.nan)
        scalars[:, 0] = np.linspace(2, 1, steps)
        if limit is not None and "grad" in norms:
            total = np.sqrt(np.sum(norms["grad"] ** 2, axis=1))
            scalars[:, 1] = limit
            scalars[:, 2] = np.minimum(1, limit / np.maximum(total, 1e-30))
            scalars[:, 3] = total > limit
        columns = [f"{kind}/{name}" for kind in norms for name in names]
        columns += ["loss", "clip/limit", "clip/scale", "clip/fraction"]
        rows = np.concatenate([*norms.values(), scalars], axis=1)
        return History.from_rows(columns, np.arange(steps), rows)

    return history
