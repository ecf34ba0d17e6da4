"""An event file is what its format says, read here by the definition of that."""

import math
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from gradnorm_jax.monitoring.tensorboard import TensorBoard, crc32c
from gradnorm_jax.monitoring.writers import as_writer


def crc_by_bits(data):
    """The checksum as polynomial division, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc_by_bits(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def records(data):
    """Yields the whole records of a file, whose checks it checks."""
    while len(data) >= 12:
        size, check = struct.unpack("<QI", data[:12])
        assert check == masked(data[:8])
        if len(data) < size + 16:
            return
        event = data[12 : 12 + size]
        assert struct.unpack("<I", data[12 + size : 16 + size]) == (masked(event),)
        yield event
        data = data[16 + size :]


def fields(message):
    """Takes a message of protocol buffers apart: its numbers and contents, in order."""

    def varint():
        nonlocal message
        digit, message = message[0], message[1:]
        return digit if digit < 0x80 else digit - 0x80 + 0x80 * varint()

    while message:
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[:size]
        message = message[size:]


def events(directory):
    """Returns (step, scalars) of the one event file in a directory."""
    (path,) = directory.iterdir()
    first, *rest = (dict(fields(record)) for record in records(path.read_bytes()))
    assert first[3] == b"brain.Event:2"
    found = []
    for event in rest:
        values = [dict(fields(value)) for _, value in fields(event[5])]
        scalars = {x[1].decode(): struct.unpack("<f", x[2])[0] for x in values}
        found.append((event[2], scalars))
    return found


@pytest.mark.parametrize(
    ("data", "check"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_checksum_is_the_one_of_rfc_3720(data, check):
    assert crc32c(data) == check == crc_by_bits(data)


@pytest.mark.parametrize("size", [*range(1, 18), 255, 256, 257, 3400])
def test_the_checksum_is_right_at_every_length(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == crc_by_bits(data)
    assert crc32c(bytes(size)) == crc_by_bits(bytes(size))


def test_an_event_file_holds_every_scalar_as_float32(tmp_path):
    path = tmp_path / "board"
    writer = as_writer(path, prefix="norms/")
    odd = [math.nan, math.inf, -math.inf, 0.0, 1e-45, 3.4e38, 1 / 3, 1e39, 1e-46]
    writer.write(3, {f"{'x' * 50 * i}\u2016g\u2016": x for i, x in enumerate(odd)})
    writer.write(-1, {"clip/scale": 0.5})
    writer.write(2**40, {"clip/scale": 1.0})
    (step, scalars), *more = events(path)  # before it is closed
    assert step == 3
    names = [f"norms/{'x' * 50 * i}\u2016g\u2016" for i in range(len(odd))]
    assert list(scalars) == names
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(list(scalars.values()), np.float32(odd))
    assert more == [
        (2**64 - 1, {"norms/clip/scale": 0.5}),  # two's complement
        (2**40, {"norms/clip/scale": 1.0}),
    ]
    writer.close()
    writer.close()


def test_each_run_in_a_directory_has_a_file_of_its_own(tmp_path):
    made = [TensorBoard(tmp_path) for _ in range(3)]
    for writer in made:
        writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted({writer.path.name for writer in made})
    assert len(names) == 3


def png_of(width, height, color=2):
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(4)


@pytest.mark.parametrize(("color", "space"), [(0, 1), (2, 3), (3, 3), (4, 2), (6, 4)])
def test_a_picture_is_kept_with_its_size_and_name(tmp_path, color, space):
    png = png_of(640, 480, color)
    writer = as_writer([tmp_path, print])  # only one of them takes pictures
    writer.write_image(9, "heat map", png)
    writer.close()
    (path,) = tmp_path.iterdir()
    event = dict(fields(list(records(path.read_bytes()))[1]))
    assert event[2] == 9
    value = dict(fields(dict(fields(event[5]))[1]))
    assert value[1] == b"gradnorm/heat map"
    assert dict(fields(value[4])) == {1: 480, 2: 640, 3: space, 4: png}


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0 jpeg", png_of(1, 1)[:20]])
def test_a_picture_that_is_no_png_is_refused(tmp_path, data):
    writer = TensorBoard(tmp_path)
    with pytest.raises(ValueError, match=r"write_image\(png=.*must be .* a PNG"):
        writer.write_image(0, "heat map", data)
    writer.close()


KILLED = """
import sys
from gradnorm_jax.monitoring.tensorboard import TensorBoard

writer = TensorBoard(sys.argv[1])
for step in range(10**9):
    writer.write(step, {f"norm/{i}": step + i for i in range(50)})
    print(step, flush=True)
"""


def test_a_kill_leaves_every_step_that_was_written(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 300:
                process.kill()
            last = int(line)
    assert process.returncode == -signal.SIGKILL
    found = events(tmp_path)
    assert len(found) > last >= 300
    for wanted, (step, scalars) in enumerate(found):
        assert step == wanted
        assert scalars == {f"norm/{i}": float(step + i) for i in range(50)}
