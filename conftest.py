"""What every test and every example of a docstring starts from."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the time goes into compiling, and much of it is what another process compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{os.path.dirname(__file__)}/.jax_cache"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jax.numpy as jnp
import optax
import pytest

import gradnorm_jax as gn


@pytest.fixture(autouse=True)
def _names_of_the_examples(doctest_namespace):
    doctest_namespace |= {"gn": gn, "jax": jax, "jnp": jnp, "optax": optax}
