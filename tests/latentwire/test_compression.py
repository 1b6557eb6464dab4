"""Text at the wire's price: cut or compressed to bytes, and exactly what the other side reads."""

from __future__ import annotations

import lzma
import zlib

import pytest

from stillhouse.studies.latentwire.compression import compress, compress_to_bytes, cut_to_bytes, decompress

TEXT = (
    "Question: Which team won?\nContext: The American Football Conference champion Denver Broncos defeated the "
    "National Football Conference champion Carolina Panthers 24\N{EN DASH}10 to earn their third Super Bowl title. "
    "The game was played on February 7, 2016, in the San Francisco Bay Area at Santa Clara, California.\n"
)


@pytest.mark.parametrize("budget", [0, 1, 3, 50, 10_000])
def test_a_cut_text_fits_and_splits_no_character(budget: int) -> None:
    cut = cut_to_bytes(TEXT, budget)
    assert TEXT.startswith(cut) and len(cut.encode()) <= budget
    assert cut_to_bytes("aé", 2) == "a" and cut_to_bytes("aé", 3) == "aé"


@pytest.mark.parametrize("text", ["", "x", "é\N{EN DASH}", TEXT, TEXT * 40])
def test_a_message_is_read_back_and_never_longer_than_any_compressor_alone(text: str) -> None:
    message, data = compress(text), text.encode()
    assert decompress(message) == text
    assert len(message) <= 1 + min(len(data), len(zlib.compress(data, 9)), len(lzma.compress(data)))


@pytest.mark.parametrize("budget", range(0, 260, 13))
def test_a_budget_takes_the_longest_beginning_whose_message_fits(budget: int) -> None:
    message = compress_to_bytes(TEXT, budget)
    assert len(message) <= budget
    fitting = [length for length in range(len(TEXT) + 1) if len(compress(TEXT[:length])) <= budget]
    assert (len(decompress(message)) if message else -1) == max(fitting, default=-1)


def test_compression_carries_more_text_than_a_cut_at_the_same_bytes() -> None:
    assert len(decompress(compress_to_bytes(TEXT, 150))) > len(cut_to_bytes(TEXT, 150))
