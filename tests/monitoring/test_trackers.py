"""The trackers themselves read back what was written to them.

They are the extra `trackers`; a tracker that is not installed is passed over.
"""

import json
import math
import os
import shutil
import struct
import zlib

import numpy as np
import pytest

from gradnorm_jax.monitoring.tensorboard import TensorBoard
from gradnorm_jax.monitoring.writers import as_writer

pytestmark = [
    pytest.mark.trackers,
    pytest.mark.filterwarnings("ignore"),  # what a tracker warns of is its own affair
]

SCALARS = {
    "clip/scale": 0.25,
    "nan": math.nan,
    "inf": math.inf,
    "negative": -math.inf,
    "zero": 0.0,
    "tiny": float(np.float32(1e-45)),
    "large": float(np.finfo(np.float32).max),
}
STEPS = (50, 51, 3)  # the last one went back, or came late


def expect(found):
    """Compares steps and values of each scalar, NaN with NaN."""
    assert set(found) == {f"gradnorm/{name}" for name in SCALARS}
    for name, value in SCALARS.items():
        steps, values = zip(*found[f"gradnorm/{name}"], strict=True)
        assert steps == STEPS
        np.testing.assert_array_equal(values, [value] * len(STEPS))


def write(tracker):
    writer = as_writer(tracker)
    for step in STEPS:
        writer.write(step, SCALARS)
    writer.close()


# TensorBoard.


@pytest.fixture
def board():
    """Returns a function that reads a directory as TensorBoard does."""
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )

    def read(directory):
        everything = {"scalars": 0, "images": 0}
        found = module.EventAccumulator(str(directory), size_guidance=everything)
        return found.Reload()

    return read


def scalars_of(found):
    return {
        name: [(x.step, x.value) for x in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_reads_every_scalar(board, tmp_path):
    write(tmp_path)
    expect(scalars_of(board(tmp_path)))


@pytest.mark.parametrize("step", [-1, -(2**63), 0, 2**31, 2**63 - 1])
def test_tensorboard_reads_any_step(board, tmp_path, step):
    writer = as_writer(tmp_path)
    writer.write(step, {"loss": 0.5})
    assert scalars_of(board(tmp_path)) == {"gradnorm/loss": [(step, 0.5)]}
    writer.close()


def test_tensorboard_reads_a_thousand_parts_with_any_name(board, tmp_path):
    scalars = {f"norm/{'x' * i}/kernel[{i}] \u2016g\u2016": i / 2 for i in range(1000)}
    writer = as_writer(tmp_path, prefix="")
    writer.write(0, scalars)
    writer.close()
    found = scalars_of(board(tmp_path))
    assert found == {name: [(0, value)] for name, value in scalars.items()}


def png_of(width, height):
    """A red picture."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    lines = b"".join(b"\0" + b"\xcc\x22\x22" * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def test_tensorboard_reads_pictures(board, tmp_path):
    writer = TensorBoard(tmp_path)
    pictures = {3: png_of(20, 10), 7: png_of(300, 200)}
    for step, png in pictures.items():
        writer.write_image(step, "heat map", png)
    writer.close()
    small, large = board(tmp_path).Images("heat map")
    assert (small.step, small.width, small.height) == (3, 20, 10)
    assert (large.step, large.width, large.height) == (7, 300, 200)
    assert small.encoded_image_string == pictures[3]
    assert large.encoded_image_string == pictures[7]


def test_tensorboard_reads_a_file_that_was_torn_at_any_byte(board, tmp_path):
    writer = TensorBoard(tmp_path / "whole")
    sizes = []
    for step in range(3):
        writer.write(step, {"loss": step})
        sizes.append(writer.path.stat().st_size)
    writer.close()
    for size in range(sizes[1], sizes[2]):
        torn = tmp_path / f"torn {size}"
        shutil.copytree(tmp_path / "whole", torn)
        os.truncate(torn / writer.path.name, size)
        assert scalars_of(board(torn)) == {"loss": [(0, 0.0), (1, 1.0)]}


def test_a_run_that_goes_on_adds_to_what_tensorboard_reads(board, tmp_path):
    for step in range(12):
        writer = TensorBoard(tmp_path)
        writer.write(step, {"loss": step})
        writer.close()
    assert scalars_of(board(tmp_path)) == {"loss": [(i, float(i)) for i in range(12)]}


def test_the_writer_of_tensorboardx_gets_every_scalar(board, tmp_path):
    module = pytest.importorskip("tensorboardX")
    tracker = module.SummaryWriter(str(tmp_path))
    write(tracker)
    tracker.add_scalar("more", 1.0, 0)  # it is not closed
    tracker.close()
    found = scalars_of(board(tmp_path))
    assert found.pop("more") == [(0, 1.0)]
    expect(found)


# Weights & Biases, offline.


def records_of(path):
    """Yields the records of a W&B file: a log in the format of LevelDB."""
    data, record, at = path.read_bytes(), b"", 7
    while at + 7 <= len(data):
        room = -at % 32768
        if 0 < room < 7:  # no header fits into the rest of this block
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The module, kept offline and in the directory of the test."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return pytest.importorskip("wandb")


def read_wandb(directory):
    """Returns the rows of the one run, and the x axis of each scalar."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    rows, axes = [], {}
    for record in map(wandb_internal_pb2.Record.FromString, records_of(path)):
        if record.HasField("metric"):
            axes[record.metric.glob_name] = record.metric.step_metric
        if record.HasField("history"):
            items = record.history.item
            row = {(x.key or "/".join(x.nested_key)): x.value_json for x in items}
            rows.append({k: json.loads(v) for k, v in row.items() if k[0] != "_"})
    return rows, axes


def test_wandb_keeps_every_scalar_also_of_steps_that_come_late(wandb, tmp_path):
    module = as_writer(wandb)  # before there is a run
    with wandb.init(project="test") as run:
        writer = as_writer(run)
        run.log({"loss": 1.0}, step=100)
        writer.write(50, SCALARS)
        run.log({"loss": 2.0}, step=101)
        module.write(51, SCALARS)
        run.log({"loss": 3.0}, step=102)
        writer.write(3, SCALARS)
        run.log({"loss": 4.0}, step=103)
    rows, axes = read_wandb(tmp_path)
    assert axes == {"gradnorm/*": "gradnorm/step"}
    assert [row["loss"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    ours = [row for row in rows if "gradnorm/step" in row]
    expect(
        {
            name: [(row["gradnorm/step"], row[name]) for row in ours]
            for name in ours[0]
            if name not in ("loss", "gradnorm/step")
        }
    )


# MLflow, in a database of SQLite.


def test_mlflow_keeps_every_scalar_but_infinities(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("test", artifact_location=str(tmp_path))
    with mlflow.start_run(experiment_id=experiment) as run:
        write(mlflow)
        as_writer(mlflow).write(-1, {"kernel[3]": 1.0})
    client = mlflow.MlflowClient()

    def history(name):
        found = client.get_metric_history(run.info.run_id, f"gradnorm/{name}")
        return [(metric.step, metric.value) for metric in found]

    largest = float(np.finfo(np.float64).max)  # what MLflow makes of an infinity
    infinities = {largest: math.inf, -largest: -math.inf}
    expect(
        {
            f"gradnorm/{name}": [
                (step, infinities.get(value, value)) for step, value in history(name)
            ]
            for name in SCALARS
        }
    )
    assert history("inf")[0][1] == largest
    assert history("kernel_3_") == [(-1, 1.0)]


# trackio, in files.


def test_trackio_keeps_every_scalar(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read by its import
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    trackio.init(
        "test", name="run", embed=False, auto_log_cpu=False, auto_log_gpu=False
    )
    write(trackio)
    trackio.finish()
    rows = storage.get_logs("test", "run")
    names = [name for name in rows[0] if name not in ("step", "timestamp")]
    expect({name: [(row["step"], row[name]) for row in rows] for name in names})
