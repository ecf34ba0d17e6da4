"""What every test and every example of a docstring starts from."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
import pytest

import gradnorm_jax as gn


@pytest.fixture(autouse=True)
def _names_of_the_examples(doctest_namespace):
    doctest_namespace |= {"gn": gn, "jax": jax, "jnp": jnp, "optax": optax}
