"""How long `import gradnorm_jax` takes once jax and optax are there."""

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
    for _ in range(options.rounds or (3 if options.quick else 7)):
        command = [sys.executable, "-c", CODE]
        out = subprocess.run(command, capture_output=True, check=True, text=True)
        before, own = map(float, out.stdout.split())
        ours.append(own)
        theirs.append(before)
    row = Row("import", "import gradnorm_jax", "", "", "import optax")
    yield timed(row._replace(limits=limits.IMPORTING), (ours, theirs))
