"""What a run is asked for, and what machine it runs on."""

import argparse
import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing, torch_peer, trees

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_SECONDS = 2.0  # for the rounds of one comparison, of a suite that was asked for
_SECONDS_AMONG_ALL = 0.6
_QUICK_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Options:
    """What a suite goes by.

    Attributes:
      device: The platform that everything runs on: cpu, gpu or tpu.
      quick: Whether fewer trees, dtypes and rounds will do.
      tiny: Whether trees are so small that only the program is tried, not the machine.
      alone: Whether suites were chosen by name.
      rounds: How many rounds each comparison has; `None` for as many as fit.
      models: The models of per-example norms, if they were chosen.
      arms: The arms of per-example norms, if they were chosen.
      batches: The batch sizes of per-example norms, if they were chosen.
    """

    device: str = "cpu"
    quick: bool = False
    tiny: bool = False
    alone: bool = False
    rounds: int | None = None
    models: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether suites run all their cases: those asked for by name.

        In a run of all suites some have to do, as it is to end within ten minutes.
        """
        return self.alone and not self.quick and not self.tiny

    @property
    def seconds(self) -> float:
        """How long the rounds of one comparison may take, unless they are counted."""
        if self.quick:
            return _QUICK_SECONDS
        return _SECONDS if self.whole else _SECONDS_AMONG_ALL

    @functools.cached_property
    def stream(self) -> timing.Stream:
        """What uses memory as fast as it can be used on the device."""
        return timing.stream(self.device, 2**20 if self.tiny else 85_000_000)

    @functools.cached_property
    def torch(self) -> bool:
        """Whether PyTorch is there, on the same device."""
        return not torch_peer.why_missing(self.device)

    def shapes(self, name: str) -> trees.Shapes:
        """Returns the shapes of a tree by its name."""
        return (trees.TINY if self.tiny else trees.FULL)[name]

    def in_turn(
        self, arms: dict[str, timing.Arm], seconds: float | None = None
    ) -> dict[str, list[float]]:
        """Times arms round by round, within the time that one comparison may take."""
        return timing.in_turn(arms, seconds or self.seconds, self.rounds)


def machine(given: argparse.Namespace, options: Options) -> dict[str, Any]:
    """Returns what rows are to be read with: the machine, versions, the command."""
    names = ("jax", "jaxlib", "optax", "numpy", *(("torch",) if options.torch else ()))
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": timing.cores(),
        "versions": {name: importlib.metadata.version(name) for name in names}
        | {"python": platform.python_version()},
        "command": _command(given),
    }


def _command(given: argparse.Namespace) -> str:
    """Returns the command by which the same can be measured again."""
    words = ["python -m benchmarks"]
    for name in ("device", "quick", "only", "repeats", "tiny", "model", "arm", "batch"):
        value = getattr(given, name)
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            many: Sequence[Any] = value if isinstance(value, list) else [value]
            words += [repr(word) if " " in str(word) else str(word) for word in many]
    return " ".join(words)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
