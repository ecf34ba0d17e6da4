"""What every test and every example of a docstring starts from."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the time goes into compiling, and much is compiled by every process anew.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in COMPILED.items():
    os.environ.setdefault(name, value)

import jax
import jax.numpy as jnp
import optax
import pytest

import gradnorm_jax as gn


@pytest.fixture(autouse=True)
def _names_of_the_examples(doctest_namespace):
    doctest_namespace |= {"gn": gn, "jax": jax, "jnp": jnp, "optax": optax}
