"""Gemma's tokenizer from a GGUF file: byte-pair merges rebuilt from the scores of its pieces.

The loader of transformers builds a unigram model, which cuts words differently, and which a reload turns into single
characters. A sentencepiece BPE score is the negative rank of the merge that makes the piece, so that the merges of
the published tokenizer (514,906 for Gemma 3) follow from the file.
"""

from __future__ import annotations

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken
from transformers import GemmaTokenizer


def gemma_tokenizer(gguf: GGUFReader) -> GemmaTokenizer:
    """The tokenizer of `gguf`, as `GemmaTokenizer` saves and reloads it; it begins texts with `<bos>`."""
    names, scores, types = (
        gguf.fields[f"tokenizer.ggml.{field}"].contents() for field in ("tokens", "scores", "token_type")
    )
    pieces = [name.replace(" ", "▁") for name in names]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # User-defined pieces, such as runs of spaces, come before every learnt one, as in sentencepiece.
    ranks = [
        (0.0 if kind == TokenType.USER_DEFINED else score, index)
        for index, (score, kind) in enumerate(zip(scores, types, strict=True))
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    ]
    merges = [
        pair
        for _, index in sorted(ranks, key=lambda rank: (-rank[0], rank[1]))
        for pair in _pairs(pieces[index], vocabulary)
    ]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [piece for piece, found in zip(pieces, types, strict=True) if found == kind]
        tokenizer.add_tokens(
            [AddedToken(piece, normalized=False, special=special) for piece in added], special_tokens=special
        )
    return tokenizer


def _pairs(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every division of `piece` into two pieces, the older ones first."""
    divisions = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    known = [pair for pair in divisions if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
