"""TensorBoard's event file: scalars and pictures, as TFRecords of protocol buffers.

tensorboardX would do, but importing it imports torch where that is installed, and its writer's thread dies unheard on a full
disk.
Format: tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, and TFRecord's masked CRC-32C.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""
RGB = 3


def _crc_table() -> Iterator[int]:
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        yield value


_CRC = tuple(_crc_table())


def masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, kind: int, value: bytes) -> bytes:
    return _varint(number << 3 | kind) + (_varint(len(value)) if kind == BYTES else b"") + value


class EventFile:
    """One file of a folder, appended to by the caller's own thread. OSErrors of the disk are the caller's."""

    def __init__(self, folder: Path, start_step: int = 0):
        """start_step: what an earlier run wrote of later steps is hidden."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._event(start_step, _field(3, BYTES, b"brain.Event:2"))
        if start_step:
            self._event(start_step + 1, _field(7, BYTES, _field(1, VARINT, _varint(1))))  # SessionLog.START

    def scalar(self, name: str, value: float, step: int) -> None:
        self._summary(name, _field(2, FIXED32, struct.pack("<f", value)), step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """uint8 [h w 3]"""
        png = io.BytesIO()
        Image.fromarray(picture).save(png, format="PNG")
        h, w = picture.shape[:2]
        sizes = b"".join(_field(number, VARINT, _varint(value)) for number, value in ((1, h), (2, w), (3, RGB)))
        self._summary(name, _field(4, BYTES, sizes + _field(4, BYTES, png.getvalue())), step)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _summary(self, name: str, value: bytes, step: int) -> None:
        self._event(step, _field(5, BYTES, _field(1, BYTES, _field(1, BYTES, name.encode()) + value)))

    def _event(self, step: int, what: bytes) -> None:
        event = _field(1, FIXED64, struct.pack("<d", time.time())) + _field(2, VARINT, _varint(step)) + what
        length = struct.pack("<Q", len(event))
        crcs = (struct.pack("<I", masked_crc(part)) for part in (length, event))
        self._file.write(length + next(crcs) + event + next(crcs))
