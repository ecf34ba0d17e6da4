"""Norms, clips and steps on a mesh of eight virtual devices, beside this process."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.options import Options
from benchmarks.rows import Limits, Row


def rows(options: Options) -> Iterator[Row]:
    """Hands on the rows of a process that has eight devices."""
    given = json.dumps(dataclasses.asdict(options))
    command = [sys.executable, "-m", "benchmarks.mesh", given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Row(**json.loads(line) | {"limits": Limits()})
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
