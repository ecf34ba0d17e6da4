"""The command `doctor`: looks for what is missing, too old, or known to mislead."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax
from gradnorm_jax import monitoring
from gradnorm_jax.cli import terminal
from gradnorm_jax.norms import global_norm
from gradnorm_jax.watching import watch

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
_LARGE = 2.0**65  # its square is beyond float32

_EXTRAS = {
    "rich": ("the table of `gradnorm watch`, progress bars", "gradnorm-jax[cli]"),
    "matplotlib": ("pictures as PNG files and in notebooks", "gradnorm-jax[plot]"),
    "flax": ("`gradnorm demo`", "gradnorm-jax[demo]"),
    "sklearn": ("`gradnorm demo`", "gradnorm-jax[demo]"),
    "pandas": ("`Monitor.to_pandas()`", "pandas"),
    "tensorboard": ("a look at the files that `as_writer` writes", "tensorboard"),
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class Check(NamedTuple):
    """What was looked at, how it stands, and what to know about it."""

    what: str
    state: str
    text: str


def run(options: argparse.Namespace) -> int:
    """Prints how this installation stands; 1 if anything is broken."""
    sections: dict[str, Callable[[], Iterator[Check]]] = {
        "Versions": versions,
        "Devices": devices,
        "Extras": extras,
        "Records": records,
        "Hazards": hazards,
    }
    broken = 0
    for title, section in sections.items():
        print(title)
        for check in section():
            start = f"  {check.state:6}  {check.what:14}  "
            print(terminal.hanging(start, check.text))
            broken += check.state == BROKEN
    print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return int(broken > 0)


def versions() -> Iterator[Check]:
    """Python and what this package requires, against the versions it requires."""
    yield Check("python", OK, f"{platform.python_version()} on {platform.platform()}")
    yield Check("gradnorm_jax", OK, gradnorm_jax.__version__)
    for name, least in (*_required(), ("jaxlib", "")):
        version = _version(name)
        if version is None:
            yield Check(name, BROKEN, f"not installed: pip install '{name}>={least}'")
        elif least and _numbers(version) < _numbers(least):
            text = f"{version} is too old: pip install -U '{name}>={least}'"
            yield Check(name, BROKEN, text)
        else:
            yield Check(name, OK, version + (f"  (>= {least})" if least else ""))


def devices() -> Iterator[Check]:
    """What JAX computes on."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        text = f"JAX finds none: {reason} Is JAX_PLATFORMS set to what is not here?"
        yield Check("devices", BROKEN, text)
        return
    kinds = ", ".join(sorted({device.device_kind for device in found}))
    yield Check(jax.default_backend(), OK, f"{len(found)} x {kinds}")
    if jax.process_count() > 1:
        text = f"{jax.process_count()} processes; process 0 alone writes runs"
        yield Check("processes", OK, text)
    wide = jnp.asarray(np.zeros(1)).dtype == np.float64
    text = "on: norms of float64 are float64" if wide else "off: norms are float32"
    yield Check("x64", OK, f"{text}; rows of a run are float32")


def extras() -> Iterator[Check]:
    """What is not required, and what it would be for."""
    for name, (purpose, package) in _EXTRAS.items():
        distribution = _DISTRIBUTIONS.get(name, name)
        if importlib.util.find_spec(name):
            version = _version(distribution) or ""
            yield Check(distribution, OK, f"{version}, for {purpose}")
        else:
            text = f"not here; for {purpose}: pip install '{package}'"
            yield Check(distribution, "-", text)


def records() -> Iterator[Check]:
    """Whether norms, and a record of them, come out right on these devices."""
    for what, act in {"norms": _measures, "a watched step": _records}.items():
        try:
            yield Check(what, *act())
        except Exception as error:  # whatever it is, it is to be told
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Check(what, BROKEN, text)


def _measures() -> tuple[str, str]:
    given = {
        "of 3e19 twice": ([_LARGE, _LARGE], _LARGE * 2**0.5),
        "of 1e-30 twice": ([2.0**-100, 2.0**-100], 2.0**-99.5),
        "of NaN": ([np.nan, 1.0], np.nan),
        "of 0": ([0.0, 0.0], 0.0),
    }
    measure = jax.jit(global_norm)
    for name, (entries, wanted) in given.items():
        got = float(measure(jnp.array(entries, jnp.float32)))
        if not np.isclose(got, wanted, rtol=1e-5, atol=0, equal_nan=True):
            return BROKEN, (
                f"the norm {name} is {got:g}, not {wanted:g}. XLA_FLAGS may ask for"
                " fast math: take that out."
            )
    return OK, "right for 3e19, 1e-30, NaN and 0"


def _records() -> tuple[str, str]:
    params = {"w": jnp.array([3.0, 4.0])}
    tx = watch(optax.sgd(1.0), window=2)

    @jax.jit
    def step(state):
        return tx.update(params, state, params)[1]

    monitor = monitoring.Monitor(params, every=1, warn="off")
    with jax.debug_nans(False):  # what there is none of is NaN in a row
        monitor(step(jax.jit(tx.init)(params)))
        monitor.close()
    got = monitor.to_dict()["grad/w"]
    right = np.allclose(got, [5.0])
    return (OK, "read back") if right else (BROKEN, f"read back as {got}, not [5.]")


def hazards() -> Iterator[Check]:
    """Settings and packages that are known to mislead."""
    found = list(_hazards())
    yield from found or [Check("none known", OK, "of those that are looked for")]


def _hazards() -> Iterator[Check]:
    config: Any = jax.config
    if config.jax_debug_nans or config.jax_debug_infs:
        text = "JAX raises at the first NaN, before its step has a row"
        yield Check("jax_debug_nans", NOTE, text)
    if config.jax_disable_jit:
        yield Check("jax_disable_jit", NOTE, "every step is slow, and so is its record")
    gpu = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
    if gpu and not config.jax_platforms and jax.default_backend() == "cpu":
        text = "this machine has a GPU that JAX does not use: pip install 'jax[cuda12]'"
        yield Check("GPU", NOTE, text)
    if "fast_math=true" in os.environ.get("XLA_FLAGS", ""):
        text = "fast math in XLA_FLAGS may take a NaN for a number"
        yield Check("XLA_FLAGS", NOTE, text)
    if importlib.util.find_spec("mlflow"):
        text = "its databases keep an infinity as 1.8e308; the run itself keeps inf"
        yield Check("mlflow", NOTE, text)
    if not terminal.speaks_unicode():
        text = f"{sys.stdout.encoding}: curves are drawn in ASCII. PYTHONUTF8=1 helps"
        yield Check("encoding", NOTE, text)
    if not os.access(".", os.W_OK):
        text = f"{os.getcwd()} may not be written to: give `Monitor(dir=...)` another"
        yield Check("directory", NOTE, text)


def _required() -> list[tuple[str, str]]:
    """Returns what this package requires, with the least version of each."""
    try:
        lines = importlib.metadata.requires("gradnorm-jax") or []
    except importlib.metadata.PackageNotFoundError:  # run without being installed
        lines = ["jax", "numpy", "optax"]
    found = [
        re.match(r"([\w.-]+)(?:>=([\d.]+))?", one) for one in lines if ";" not in one
    ]
    return [(one[1], one[2] or "") for one in found if one]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at its end: 0.10.0 is 0.10."""
    digits = re.match(r"[\d.]*", version)
    numbers = [int(one) for one in digits[0].split(".") if one] if digits else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


__all__ = ["Check", "devices", "extras", "hazards", "records", "run", "versions"]
