"""How long `import gradnorm_jax` takes once jax and optax are there."""

import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks import limits
from benchmarks.comparing import timed
from benchmarks.options import Options
from benchmarks.rows import Row

# The collector runs first: what it has to do by then is not for an import to pay.
CODE = """
import gc, time
import jax
gc.collect(); start = time.perf_counter()
import optax
print(time.perf_counter() - start)
gc.collect(); start = time.perf_counter()
import gradnorm_jax
print(time.perf_counter() - start)
"""


def rows(options: Options) -> Iterator[Row]:
    """Compares the import with that of Optax once jax is there."""
    ours, theirs = [], []
    _imported()  # from now on there is bytecode
    for _ in range(options.rounds or (3 if options.quick else 7)):
        before, own = _imported()
        ours.append(own)
        theirs.append(before)
    row = Row("import", "import gradnorm_jax", "", "", "import optax")
    yield timed(row._replace(limits=limits.IMPORTING), (ours, theirs))


def _imported() -> tuple[float, float]:
    """Returns the seconds that importing optax takes, and ours, from bytecode."""
    out = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        check=True,
        text=True,
    )
    before, own = map(float, out.stdout.split())
    return before, own
