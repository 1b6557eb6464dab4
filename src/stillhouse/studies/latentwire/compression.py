"""Text at the wire's price: what of a text fits into a number of bytes, cut or compressed by a standard compressor.

This is the bar that a latent has to clear. The sender keeps the longest beginning of the text that fits, and the
receiver gets exactly that text; nothing is counted that the receiver would not need.
"""

from __future__ import annotations

import lzma
import zlib

# Raw streams: a container's magic number and checksum would be held against the text for nothing.
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 16}]
_STORED, _DEFLATE, _LZMA = b"\x00", b"\x01", b"\x02"


def cut_to_bytes(text: str, budget: int) -> str:
    """The longest beginning of the text that is at most `budget` bytes of UTF-8; no character is split."""
    return text.encode()[:budget].decode(errors="ignore")


def compress(text: str) -> bytes:
    """The text as it would be sent: a byte that names the compressor (DEFLATE, LZMA, none), and the smallest stream."""
    data = text.encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    streams = (
        _STORED + data,
        _DEFLATE + deflate.compress(data) + deflate.flush(),
        _LZMA + lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS),
    )
    return min(streams, key=len)


def decompress(message: bytes) -> str:
    """The text of a message that `compress` made."""
    kind, stream = message[:1], message[1:]
    if kind == _DEFLATE:
        stream = zlib.decompress(stream, -zlib.MAX_WBITS)
    elif kind == _LZMA:
        stream = lzma.decompress(stream, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    return stream.decode()


def compress_to_bytes(text: str, budget: int) -> bytes:
    """The message with the longest beginning of the text that fits into `budget` bytes; b"" where not even "" does.

    A longer text may be a byte smaller than a shorter one, so the first that does not fit is not the end: bisection
    finds it, and a look past it takes what still fits.
    """
    if budget < len(_STORED):
        return b""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(compress(text[:middle])) <= budget else (low, middle - 1)
    for length in range(min(len(text), low + 8), low, -1):
        if len(message := compress(text[:length])) <= budget:
            return message
    return compress(text[:low])
