"""Which bodies are used, where there is more than one."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

IMPLEMENTATIONS = ("xla", "pallas")

_CHOSEN: ContextVar[str] = ContextVar("implementation", default="xla")


def chosen() -> str:
    """Returns which bodies are used by what is traced now."""
    return _CHOSEN.get()


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Has norms measured by "xla", the default, or "pallas".

    The Pallas body reads many leaves with one launch of a GPU. It was tested against
    the other step by step on a CPU, and has not been timed: so it is for trying. What
    was compiled before keeps its body.

    Args:
      name: Which bodies to use. On a CPU or TPU "pallas" is interpreted, slowly.

    Raises:
      ValueError: If there is no such implementation.

    Example:
      >>> import gradnorm_jax as gn
      >>> with implementation("pallas"):
      ...     print(gn.global_norm({"b": jnp.array([3.0]), "w": jnp.array([4.0])}))
      5.0
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation(name)` must be one of {IMPLEMENTATIONS}, got {name!r}."
        )
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
