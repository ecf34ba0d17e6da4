"""The package is as DESIGN promises: one face, no host code, small files."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import gradnorm_jax as gn

from .shares import SHARES

ROOT = Path(gn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HOST = (
    "flax",
    "matplotlib",
    "sklearn",
    "rich",
    "dp_accounting",
    "gradnorm_jax.monitoring",
)


def exported():
    """Every public function and class, of the face and of its four modules."""
    modules = [gn, gn.norms, gn.privacy, gn.thresholds, gn.shrink]
    named = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules
        for name in module.__all__
        if name != "monitoring"
    }
    return {name: x for name, x in named.items() if not isinstance(x, types.ModuleType)}


def test_what_can_be_imported_is_what_is_exported():
    code = "import gradnorm_jax; print(*vars(gradnorm_jax))"
    fresh = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    rooms = {module.name for module in pkgutil.iter_modules(gn.__path__)}
    face = {name for name in fresh.stdout.split() if not name.startswith("_")}
    own = face - (rooms - set(gn.__all__)) - {"Any", "TYPE_CHECKING"}
    assert own | {"monitoring"} == set(gn.__all__)
    assert gn.__all__ == sorted(gn.__all__)
    assert all(hasattr(gn, name) for name in gn.__all__)


def test_no_module_hides_what_bears_its_name():
    for module in (gn.norms, gn.privacy, gn.thresholds, gn.shrink):
        given = [getattr(module, name) for name in module.__all__]
        assert not [x for x in given if isinstance(x, types.ModuleType)]


def test_import_loads_nothing_of_the_host():
    code = (
        "import gradnorm_jax, sys;"
        f"print(*[m for m in {HOST} if m in sys.modules]);"
        "gradnorm_jax.monitoring; print('gradnorm_jax.monitoring' in sys.modules)"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.split("\n")[:2] == ["", "True"]


@pytest.mark.parametrize(
    "name", [k for k, x in exported().items() if inspect.isroutine(x)]
)
def test_every_function_has_its_sentence_and_its_arguments(name):
    function = exported()[name]
    text = inspect.getdoc(function)
    assert text.split("\n")[0].endswith(".")
    for argument in inspect.signature(function).parameters:
        assert f"{argument}: " in text or "Args:" not in text


@pytest.mark.parametrize(
    "name", [name for name in gn.__all__ if inspect.isroutine(getattr(gn, name, None))]
)
def test_every_function_of_the_face_has_an_example_or_is_a_choice(name):
    choices = {"per_group", "per_leaf", "per_unit", "whole_tree"}
    assert name in choices or ">>> " in inspect.getdoc(getattr(gn, name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.startswith(('"""', 'r"""'))
    odd = {"utils", "misc", "helpers", "common", "base", "core"}
    assert path.stem.strip("_") not in odd


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_reaches_into_what_is_private(path):
    text = path.read_text()
    assert "jax._src" not in text
    assert "optax._src" not in text


def test_every_module_of_the_core_names_what_it_gives():
    for module in (
        *("norms", "thresholds", "shrink", "telemetry", "clipping", "methods"),
        "privacy",
    ):
        loaded = importlib.import_module(f"gradnorm_jax.{module}")
        assert loaded.__all__
        assert all(hasattr(loaded, name) for name in loaded.__all__)


@pytest.mark.parametrize("name", SHARES)
def test_each_share_that_the_gate_runs_is_of_a_test_that_there_is(name):
    path, test = name.split("::")
    assert f"def {test}(" in (Path(__file__).parent / path).read_text()
