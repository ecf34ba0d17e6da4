"""What the tests share: eight CPU devices, one Hypothesis profile, strict numbers."""

import gc

import hypothesis
import jax
import pytest

from .shares import leave_out, one_in_so_many

jax.config.update("jax_num_cpu_devices", 8)

gc.set_threshold(200_000, 50, 100)  # JAX keeps what it compiled: looking there is vain

hypothesis.settings.register_profile(
    "gradnorm", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("gradnorm")


@pytest.fixture(scope="module")
def strict():
    """Refuses silent promotion, so that every cast in the core is written down.

    Optax promotes silently: `jax.numpy_dtype_promotion("standard")` around its calls.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_was_compiled_is_forgotten():
    """Leaves a process small: XLA ends it where it holds a thousand programs."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    """Leaves cases out, unless all are asked for."""
    leave_out(config, items, one_in_so_many())
