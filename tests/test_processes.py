"""Two real processes train, measure, clip and record as one process does."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gradnorm_jax as gn

from . import two_processes

ROOT = Path(__file__).parents[1]
TIMEOUT = 180.0
NOT_OURS = re.compile(r".*_proxy$|(JAX|XLA|SLURM|OMPI|COVERAGE|COV)_.*", re.IGNORECASE)


def run(directory, *commands, devices):
    """Runs modules of this repository side by side; returns what each one printed.

    Each has CPU devices of its own. Where one fails, the others would wait for it for
    minutes, and JAX catches a polite SIGTERM: they are killed, as they are at the end.
    """
    environment = {k: v for k, v in os.environ.items() if not NOT_OURS.fullmatch(k)}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    with contextlib.ExitStack() as stack:
        children = []
        for k, command in enumerate(commands):
            out, errors = (
                stack.enter_context(open(directory / f"{name}-{k}.txt", "w"))
                for name in ("out", "errors")
            )
            child = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=errors,
            )
            children.append(stack.enter_context(child))
            stack.callback(child.kill)
        until = time.monotonic() + TIMEOUT
        while None in (codes := [child.poll() for child in children]):
            if any(codes) or time.monotonic() > until:
                break
            time.sleep(0.1)
    errors = [(directory / f"errors-{k}.txt").read_text() for k in range(len(codes))]
    assert codes == [0] * len(codes), "\n".join(errors)
    return [(directory / f"out-{k}.txt").read_text() for k in range(len(codes))]


def free_port():
    """A port that nobody listened to a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The figures of the example on one process that has four devices."""
    out = tmp_path_factory.mktemp("one")
    run(out, ["examples.distributed", "--quick", "--out", out / "run"], devices=4)
    return json.loads((out / "run" / "figures.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Where two processes with two devices each wrote, and what each one printed."""
    out = tmp_path_factory.mktemp("two")
    command = ["tests.two_processes", out, "--quick", "--num-processes", "2"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
    return out, run(out, [*command, "0"], [*command, "1"], devices=2)


@pytest.fixture(scope="module")
def found(two):
    """What each of the two processes found."""
    return [json.loads((two[0] / f"found-{k}.json").read_text()) for k in range(2)]


def numbers(words):
    return np.array([float.fromhex(word) for word in words])


def test_two_processes_train_as_one_does(one, two):
    figures = json.loads((two[0] / "example-0" / "figures.json").read_text())
    assert (one["processes"], figures["processes"]) == (1, 2)
    assert one["devices"] == figures["devices"] == 4
    assert len(one["step"]) == 20
    assert min(one["scale"]) < 1 == max(one["scale"])
    for name in ("step", "loss", "global norm", "scale", "accuracy"):
        np.testing.assert_allclose(figures[name], one[name], rtol=1e-5, err_msg=name)


def test_both_processes_end_with_the_same_parameters_bit_for_bit(found):
    assert found[0]["parameters"] == found[1]["parameters"]


def test_only_process_0_prints_a_table_and_writes_files(two):
    out, (first, second) = two
    assert "| step | loss | global norm | scale |" in first
    assert "processes: 2, devices: 4" in first
    assert not set("|;`") & set(second)  # Gloo prints lines of its own
    assert {x.name for x in (out / "record-0").iterdir()} >= {"run.json", "report.html"}
    assert not (out / "example-1").exists()
    assert not (out / "record-1").exists()


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_norms_are_of_all_shards_and_the_same_on_both_processes(found, way):
    here, there = (process[f"norms in {way}"] for process in found)
    assert here == there
    leaves = [x.astype("f8") for x in two_processes.gradients().values()]
    squares = [np.sum(x * x) for x in leaves]
    expected = np.sqrt([np.sum(squares), *squares])
    np.testing.assert_allclose(numbers(here), expected, rtol=2e-6)


def test_a_clip_in_shard_map_scales_by_the_norm_of_all_shards(found):
    assert found[0]["clipped"] == found[1]["clipped"]
    assert found[0]["scale"] == found[1]["scale"]
    leaves = [x.astype("f8").ravel() for x in two_processes.gradients().values()]
    grads = np.concatenate(leaves)
    scale = two_processes.MAX_NORM / np.sqrt(np.sum(grads * grads))
    np.testing.assert_allclose(numbers(found[0]["scale"]), scale, rtol=2e-6)
    np.testing.assert_allclose(numbers(found[0]["clipped"]), grads * scale, rtol=2e-6)


def test_one_process_alone_may_read_the_scalars_of_a_state(found):
    assert [found[0]["alone"]] == found[0]["scale"]
    assert found[1]["alone"] == "process 0 was answered"


def test_init_puts_the_state_on_the_devices_of_both_processes(found):
    assert [process["astray"] for process in found] == [[], []]
    assert found[0]["arrays"] > 10


def test_the_monitor_of_process_0_holds_what_both_processes_recorded(two, found):
    history = gn.monitoring.load(two[0] / "record-0")
    assert history.steps.tolist() == list(range(two_processes.STEPS))
    assert found[0]["ring"] == found[1]["ring"]
    ring = numbers(found[0]["ring"]).reshape(two_processes.STEPS, -1)
    np.testing.assert_array_equal(history.grad, ring[:, :3])
    np.testing.assert_array_equal(history.scalars["loss"], np.arange(5))
