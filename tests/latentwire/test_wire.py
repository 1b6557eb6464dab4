"""The wire: sizes as computed, bit-exact round trips, and a clear error for every message that is not whole."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from stillhouse.studies.latentwire.run_settings import WireKind
from stillhouse.studies.latentwire.wire import (
    HEADER_BYTES,
    WireError,
    WireFormat,
    message_bytes,
    pack,
    read_message,
    unpack,
)

KINDS: tuple[WireKind, ...] = ("fp16", "int8", "int6", "int4")
SHAPES = ((1, 1), (3, 5), (8, 64), (7, 33), (32, 256))


def latents(length: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, dimension, generator=torch.Generator().manual_seed(seed))


def naive_dequantised(values: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Group by group in plain arithmetic: what a receiver should get."""
    result = torch.empty_like(values)
    largest = 2 ** (bits - 1) - 1
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], group_size):
            group = values[row, start : start + group_size]
            scale = (group.abs().max() / largest).half().float().clamp(min=2.0**-14)
            codes = (group / scale).round().clamp(-largest, largest)
            result[row, start : start + group_size] = codes * scale
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [1, 8, 32])
def test_every_format_round_trips_bit_exactly_at_the_computed_size(kind, shape, group_size):
    values, wire_format = latents(*shape), WireFormat(kind, group_size)
    message = pack(values, wire_format)
    received = unpack(message)
    assert len(message) == message_bytes(*shape, wire_format)
    expected = values.half().float() if kind == "fp16" else naive_dequantised(values, wire_format.bits, group_size)
    assert torch.equal(received, expected)
    assert pack(received, wire_format) == message
    assert pack(values, wire_format) == message


def test_sizes_are_a_header_scales_and_packed_codes():
    assert HEADER_BYTES == 16
    assert message_bytes(32, 256, WireFormat("fp16")) == 16 + 32 * 256 * 2
    assert message_bytes(32, 256, WireFormat("int8", 32)) == 16 + 32 * 8 * 2 + 32 * 256
    assert message_bytes(32, 256, WireFormat("int6", 32)) == 16 + 32 * 8 * 2 + 32 * 192
    assert message_bytes(32, 256, WireFormat("int4", 64)) == 16 + 32 * 4 * 2 + 32 * 128
    assert message_bytes(1, 5, WireFormat("int6", 3)) == 16 + 2 * 2 + 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-4, 1.0, 3e4])
def test_the_error_is_at_most_half_a_step_at_every_size_of_values(kind, scale):
    values, wire_format = latents(4, 64) * scale, WireFormat(kind, 16)
    values = values.clamp(-60_000, 60_000)
    message = pack(values, wire_format)
    received = unpack(message)
    assert pack(received, wire_format) == message
    steps = 2**10 if kind == "fp16" else 2 ** (wire_format.bits - 1) - 1
    smallest = 2.0**-25 if kind == "fp16" else 2.0**-15
    bound = (values.abs().amax() / steps * 0.51).clamp(min=smallest * 1.01)
    assert (received - values).abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_to_a_message_is_refused(kind):
    """A thousand damaged messages: cut, lengthened, or with bytes changed, header and payload alike."""
    chance = random.Random(kind)
    message = pack(latents(5, 37), WireFormat(kind, 8))
    for _ in range(1000):
        damaged = bytearray(message)
        match chance.randrange(4):
            case 0:
                del damaged[chance.randrange(len(damaged)) :]
            case 1:
                damaged += chance.randbytes(chance.randint(1, 9))
            case 2:
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            case _:
                start = chance.randrange(len(damaged))
                replacement = chance.randbytes(chance.randint(1, 8))[: len(damaged) - start]
                damaged[start : start + len(replacement)] = replacement
        if bytes(damaged) != message:
            with pytest.raises(WireError, match="wire message"):
                unpack(bytes(damaged))


def test_a_damaged_wire_file_is_one_line_that_names_the_file(tmp_path):
    whole, path = pack(latents(2, 8), WireFormat("int6")), tmp_path / "00003-question.lwir"
    path.write_bytes(whole)
    assert torch.equal(read_message(path), unpack(whole))
    for damaged, fault in ((whole[:-1], "truncated"), (b"", "truncated"), (whole[:-1] + b"\xff", "checksum")):
        path.write_bytes(damaged)
        with pytest.raises(WireError, match=rf"00003-question\.lwir: wire message: .*{fault}") as caught:
            read_message(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(WireError, match=r"00003-question\.lwir: cannot be read \(No such file"):
        read_message(path)


def test_random_bytes_are_refused():
    chance = random.Random(0)
    for _ in range(1000):
        start = chance.choice([b"", b"LWIR", b"LWIR\x01", b"LWIR\x01\x02"])
        with pytest.raises(WireError, match="wire message"):
            unpack(start + chance.randbytes(chance.randrange(64)))


def test_a_forged_message_with_a_right_checksum_is_refused():
    """What no sender writes: an unused code, a scale of zero or NaN, bits behind the last code, values not finite."""
    import zlib

    def resealed(message: bytes, place: int, value: bytes) -> bytes:
        changed = message[:place] + value + message[place + len(value) :]
        checksum = zlib.crc32(changed[:12] + changed[16:])
        return changed[:12] + checksum.to_bytes(4, "little") + changed[16:]

    whole = pack(latents(1, 5), WireFormat("int6", 8))
    assert torch.equal(unpack(resealed(whole, 16, whole[16:18])), unpack(whole))
    infinite = numpy.float16(numpy.inf).tobytes()
    for place, value in ((18, b"\xff"), (16, b"\x00\x00"), (16, infinite), (len(whole) - 1, b"\xff")):
        with pytest.raises(WireError, match="forged"):
            unpack(resealed(whole, place, value))
    half = pack(latents(1, 5), WireFormat("fp16"))
    with pytest.raises(WireError, match="not finite"):
        unpack(resealed(half, 16, infinite))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), r"shape \[3\]"),
        (torch.zeros(0, 4), r"shape \[0, 4\]"),
        (torch.zeros(1, 70_000), "between 1 and 65535"),
        (torch.tensor([[1.0, torch.nan]]), "not finite"),
        (torch.tensor([[1.0, 1e6]]), "65,504"),
    ],
)
def test_latents_that_cannot_be_written_are_refused(values, message):
    for kind in KINDS:
        with pytest.raises(WireError, match=message):
            pack(values, WireFormat(kind))


def test_formats_out_of_range_are_refused():
    with pytest.raises(WireError, match="'int3': unknown"):
        WireFormat("int3")  # type: ignore[arg-type]
    with pytest.raises(WireError, match="group_size 0"):
        WireFormat("int8", 0)
