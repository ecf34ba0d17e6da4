"""TensorBoard event files, written without TensorBoard: scalars and pictures.

An event file is a row of TFRecords, each the bytes of one `Event` of protocol buffers
between two checksums. The few fields that are needed are put together here by hand.
"""

import functools
import itertools
import operator
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_PNG = b"\x89PNG\r\n\x1a\n"
_COLORSPACES = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # PNG's color type: TensorBoard's
_numbers = itertools.count()


class TensorBoard:
    """An event file in a directory of its own or of other event files.

    All scalars of a step go into one record, and each call ends with a flush: a run
    that is killed leaves a file that TensorBoard reads up to its last whole record.
    TensorBoard keeps float32, so a value is rounded to that, as TensorBoard's own
    writer does: what is too large becomes inf, what is too small 0. NaN, infinities
    and subnormal numbers stay what they are.

    Args:
      directory: Where the file goes, `--logdir` for TensorBoard. It is made.
      prefix: What stands before the name of each scalar and picture.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     writer = TensorBoard(directory)
      ...     writer.write(0, {"clip/scale": 0.5, "clip/fraction": float("nan")})
      ...     writer.close()
      ...     [path.name[:20] for path in Path(directory).iterdir()]
      ['events.out.tfevents.']
    """

    def __init__(self, directory: str | os.PathLike, *, prefix: str = ""):
        """Makes the directory, and in it a file that no other process writes to."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = int(time.time()), socket.gethostname(), os.getpid(), next(_numbers)
        # TensorBoard reads the files of a directory in the order of their names.
        name = "events.out.tfevents.{:010d}.{}.{}.{:06d}".format(*names)
        self.path = directory / name
        self._file = open(self.path, "xb")  # noqa: SIM115
        self._prefix = prefix
        self._heads: dict[str, bytes] = {}  # what stands before the value of a scalar
        self._append(_bytes(3, b"brain.Event:2"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of one step.

        Args:
          step: The number of the step.
          scalars: The name and the value of each.
        """
        with np.errstate(over="ignore"):  # as the class says
            values = np.array([float(x) for x in scalars.values()], "<f4").tobytes()
        pieces = []
        for i, name in enumerate(scalars):
            pieces += self._head(name), values[4 * i : 4 * i + 4]
        self._append(_step(step) + _bytes(5, b"".join(pieces)))

    def write_image(self, step: int, name: str, png: bytes) -> None:
        """Appends a picture.

        Args:
          step: The number of the step that it shows.
          name: Its name, beneath which TensorBoard shows the pictures of all steps.
          png: The bytes of a PNG file.

        Raises:
          ValueError: If `png` is no PNG.
        """
        if png[:8] != _PNG or len(png) < 33:
            raise ValueError(
                f"`write_image(png=...)` must be the bytes of a PNG file, got"
                f" {png[:8]!r}... Save the figure with `format='png'`."
            )
        width, height, _, color = struct.unpack(">IIBB", png[16:26])
        sides = _int(1, height) + _int(2, width) + _int(3, _COLORSPACES[color])
        image = _bytes(4, sides + _bytes(4, png))
        tag = _bytes(1, (self._prefix + name).encode())
        self._append(_step(step) + _bytes(5, _bytes(1, tag + image)))

    def close(self) -> None:
        """Closes the file. Closing twice does nothing more."""
        self._file.close()

    def _head(self, name: str) -> bytes:
        if name not in self._heads:
            tag = _bytes(1, (self._prefix + name).encode())
            value = 5  # bytes: the key of field 2, then a float32
            self._heads[name] = _key(1, 2) + _varint(len(tag) + value) + tag + b"\x15"
        return self._heads[name]

    def _append(self, fields: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + fields
        size = struct.pack("<Q", len(event))
        self._file.write(size + _checksum(size) + event + _checksum(event))
        self._file.flush()


def crc32c(data: bytes) -> int:
    """Returns the cyclic redundancy check of Castagnoli's polynomial.

    The check of two pieces is that of the first, carried over as many zeros as the
    second has bytes, xor that of the second. So neighbors are joined, all pairs at
    once, until one is left: 20 times as fast as byte by byte in 100 kB.

    Args:
      data: Any bytes.

    Example:
      >>> hex(crc32c(b"123456789"))
      '0xe3069283'
    """
    checks = _after_zeros(0)[0][np.frombuffer(_TO_ALL_ONES + data, np.uint8)]
    level = 0
    while len(checks) > 1:
        if len(checks) % 2:  # zeros in front do not count
            checks = np.concatenate([np.zeros(1, "<u4"), checks])
        checks = _carry(_after_zeros(level), checks[::2]) ^ checks[1::2]
        level += 1
    return int(checks[0]) ^ 0xFFFFFFFF


_TO_ALL_ONES = b"Td\x1fd"  # a check starts from all ones: these lead there from 0


@functools.cache
def _after_zeros(level: int) -> np.ndarray:
    """What `2**level` zeros make of a check, by each of its bytes: [4, 256]."""
    if level:
        half = _after_zeros(level - 1)
        return _carry(half, half)
    checks = np.arange(256, dtype="<u4") << np.array([[0], [8], [16], [24]], "<u4")
    for _ in range(8):
        checks = np.where(checks & 1, checks >> 1 ^ np.uint32(0x82F63B78), checks >> 1)
    return checks


def _carry(table: np.ndarray, checks: np.ndarray) -> np.ndarray:
    octets = checks[..., None].view(np.uint8)
    carried = [table[i].take(octets[..., i]) for i in range(4)]
    return carried[0] ^ carried[1] ^ carried[2] ^ carried[3]


def _checksum(data: bytes) -> bytes:
    """Masks the check as TFRecords do, which may hold checks as their data."""
    crc = crc32c(data)
    rotated = crc >> 15 | crc << 17
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _step(step: int) -> bytes:
    return _int(2, operator.index(step))


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _int(field: int, number: int) -> bytes:
    return _key(field, 0) + _varint(number & 0xFFFFFFFFFFFFFFFF)  # two's complement


def _key(field: int, wire_type: int) -> bytes:
    return bytes([field << 3 | wire_type])


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])
