"""Z as bytes: quantised, packed bit by bit, behind a header that says what it is; and back.

A message is a header of 16 bytes (magic `LWIR`, version, format, M, d_z, group size, CRC-32 of all the rest) and a
payload. `fp16` is the numbers themselves. `int8`, `int6` and `int4` are symmetric: each group of consecutive values
of a vector has an fp16 scale, the group's largest magnitude over 2^(bits-1) - 1; scales come first, then all codes,
least significant bit first, without gaps. Packing what was unpacked gives the same bytes again.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.run_settings import WireKind

MAGIC, VERSION = b"LWIR", 1
_PREAMBLE = struct.Struct("<4sBBHHH")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _PREAMBLE.size + _CHECKSUM.size
_KINDS: tuple[WireKind, ...] = ("fp16", "int8", "int6", "int4")
_BITS: dict[WireKind, int] = {"fp16": 16, "int8": 8, "int6": 6, "int4": 4}
# The smallest scale: below it fp16 loses precision, and a message would not survive being packed again.
_SMALLEST_SCALE = numpy.float32(2.0**-14)


class WireError(UserError):
    """A message that cannot be read, or latents that cannot be written."""


@dataclass(frozen=True)
class WireFormat:
    """How the values are written. group_size: values that share a scale (not used by fp16)."""

    kind: WireKind
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise WireError(f"wire format '{self.kind}': unknown: use one of {', '.join(_KINDS)}")
        if not 1 <= self.group_size <= 0xFFFF:
            raise WireError(f"wire format {self.kind}: group_size {self.group_size}: must be between 1 and 65535")

    @property
    def bits(self) -> int:
        """Bits of one value, its share of a scale not counted."""
        return _BITS[self.kind]


def message_bytes(length: int, dimension: int, wire_format: WireFormat) -> int:
    """The size of a message of M = `length` vectors of d_z = `dimension` values, header included."""
    scales = 0 if wire_format.kind == "fp16" else 2 * length * _groups(dimension, wire_format.group_size)
    return HEADER_BYTES + scales + (length * dimension * wire_format.bits + 7) // 8


def pack(latents: Tensor, wire_format: WireFormat) -> bytes:
    """Write Z, [M, d_z], as one message.

    Raises `WireError` for another number of dimensions, for more than 65,535 vectors or values, and for values that
    are not finite or too large for fp16.
    """
    if latents.ndim != 2 or not all(1 <= size <= 0xFFFF for size in latents.shape):
        raise WireError(f"latents of shape {list(latents.shape)}: must be [M, d_z], each between 1 and 65535")
    values = latents.detach().to("cpu", torch.float32).numpy()
    with numpy.errstate(over="ignore"):
        if not numpy.isfinite(values.astype(numpy.float16)).all():
            raise WireError("latents: hold values that are not finite or above 65,504, which fp16 cannot write")
    if wire_format.kind == "fp16":
        return _sealed(wire_format, values.shape, values.astype("<f2").tobytes())
    largest = 2 ** (wire_format.bits - 1) - 1
    grouped = _grouped(values, wire_format.group_size)
    exact = numpy.abs(grouped).max(axis=-1) / numpy.float32(largest)
    scales = numpy.maximum(exact, _SMALLEST_SCALE).astype("<f2")
    codes = numpy.rint(grouped / scales.astype(numpy.float32)[..., None]).clip(-largest, largest) + largest
    flat = codes.reshape(len(values), -1)[:, : values.shape[1]].astype(numpy.uint8)
    return _sealed(wire_format, values.shape, scales.tobytes() + _pack_bits(flat, wire_format.bits))


def unpack(data: bytes) -> Tensor:
    """Read Z, [M, d_z] fp32, from one message.

    Raises `WireError` for anything but a whole, undamaged message of this version.
    """
    wire_format, (length, dimension) = _read_header(data)
    payload = memoryview(data)[HEADER_BYTES:]
    if wire_format.kind == "fp16":
        values = numpy.frombuffer(payload, "<f2").astype(numpy.float32).reshape(length, dimension)
    else:
        largest = 2 ** (wire_format.bits - 1) - 1
        groups = _groups(dimension, wire_format.group_size)
        scales = numpy.frombuffer(payload[: 2 * length * groups], "<f2").astype(numpy.float32)
        codes = _unpack_bits(payload[2 * length * groups :], length * dimension, wire_format.bits)
        if codes.max() > 2 * largest or not (scales >= _SMALLEST_SCALE).all():
            raise WireError("wire message: holds a code or scale that no sender writes: it is damaged or forged")
        per_value = scales.reshape(length, groups).repeat(wire_format.group_size, axis=1)[:, :dimension]
        values = (codes.reshape(length, dimension).astype(numpy.float32) - largest) * per_value
    if not numpy.isfinite(values).all():
        raise WireError("wire message: holds values that are not finite: it is damaged or forged")
    return torch.from_numpy(values)


def read_message(path: Path) -> Tensor:
    """Z, [M, d_z] in fp32, of a kept wire file; `WireError` names a file that is missing, truncated or damaged."""
    try:
        return unpack(path.read_bytes())
    except OSError as error:
        raise WireError(f"{path}: cannot be read ({error.strerror}): run the evaluation that writes it") from None
    except WireError as error:
        raise WireError(f"{path}: {error}") from None


def _read_header(data: bytes) -> tuple[WireFormat, tuple[int, int]]:
    if len(data) < HEADER_BYTES:
        raise WireError(f"wire message: has {len(data)} bytes, less than its header of {HEADER_BYTES}: it is truncated")
    magic, version, kind, length, dimension, group_size = _PREAMBLE.unpack_from(data)
    if magic != MAGIC:
        raise WireError("wire message: does not begin with LWIR: it is not a message of this format")
    if version != VERSION:
        raise WireError(f"wire message: has version {version}; this program reads version {VERSION}")
    if kind >= len(_KINDS) or not length or not dimension or not group_size:
        raise WireError(
            f"wire message: the header names format {kind}, shape [{length}, {dimension}], groups of {group_size}: "
            "it is damaged"
        )
    wire_format = WireFormat(_KINDS[kind], group_size)
    expected = message_bytes(length, dimension, wire_format)
    if len(data) != expected:
        raise WireError(
            f"wire message: has {len(data)} bytes, but {wire_format.kind} of shape [{length}, {dimension}] takes "
            f"{expected}: it is truncated or has something behind it"
        )
    [checksum] = _CHECKSUM.unpack_from(data, _PREAMBLE.size)
    if checksum != _checksum(data[: _PREAMBLE.size], data[HEADER_BYTES:]):
        raise WireError("wire message: its checksum does not fit: it is damaged; send it again")
    return wire_format, (length, dimension)


def _sealed(wire_format: WireFormat, shape: tuple[int, ...], payload: bytes) -> bytes:
    preamble = _PREAMBLE.pack(MAGIC, VERSION, _KINDS.index(wire_format.kind), *shape, wire_format.group_size)
    return preamble + _CHECKSUM.pack(_checksum(preamble, payload)) + payload


def _checksum(preamble: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(preamble))


def _groups(dimension: int, group_size: int) -> int:
    return -(-dimension // group_size)


def _grouped(values: NDArray[numpy.float32], group_size: int) -> NDArray[numpy.float32]:
    """[M, groups, group_size], the last group of each vector filled up with zeros."""
    length, dimension = values.shape
    groups = _groups(dimension, group_size)
    padded = numpy.zeros((length, groups * group_size), dtype=numpy.float32)
    padded[:, :dimension] = values
    return padded.reshape(length, groups, group_size)


def _pack_bits(codes: NDArray[numpy.uint8], bits: int) -> bytes:
    spread = numpy.unpackbits(codes.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return numpy.packbits(spread.reshape(-1), bitorder="little").tobytes()


def _unpack_bits(data: memoryview, count: int, bits: int) -> NDArray[numpy.uint8]:
    stream = numpy.unpackbits(numpy.frombuffer(data, numpy.uint8), bitorder="little")
    if stream[count * bits :].any():
        raise WireError("wire message: the bits after its last code are not zero: it is damaged or forged")
    spread = stream[: count * bits].reshape(count, bits)
    return numpy.packbits(spread, axis=1, bitorder="little")[:, 0]
