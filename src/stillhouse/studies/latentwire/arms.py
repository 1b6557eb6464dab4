"""The arms: what a reader gets before the answer, as text cut or compressed to a budget, replayed or as latents.

Every arm ends in a `Prompt`, so that all of them are scored by the same code. A text arm is first token ids: two arms
that come to the same ids (a budget above the text's length) are one computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stillhouse.studies.latentwire.compression import compress_to_bytes, cut_to_bytes, decompress
from stillhouse.studies.latentwire.config import Arm, PromptStyle
from stillhouse.studies.latentwire.data import WireExample, question_text
from stillhouse.studies.latentwire.reader import Prefix, Prompt, Reader

TOKEN_BUDGET: dict[Arm, PromptStyle] = {
    "token_budget_content_only": "content_only",
    "token_budget_chat_full": "chat_full",
}
BYTE_BUDGET: tuple[Arm, ...] = ("byte_budget_cut", "byte_budget_compressed")
REPLAY: tuple[Arm, ...] = ("replay_raw", "replay_anchor", "replay_adapter")
Calibration = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TextPrompt:
    """A text as one reader gets it.

    ids: the whole prompt. bytes: what is sent for it. content: positions that carry it, without BOS and anchor.
    """

    ids: tuple[int, ...]
    bytes: int
    content: int


def text_prompt(arm: Arm, reader: Reader, example: WireExample, budget: int = 0) -> TextPrompt:
    """The prompt of a text arm; `budget` in tokens or bytes, as the arm says."""
    if arm == "full_text":
        return _whole(reader, example.text, example.text_bytes)
    if arm == "no_context":
        question = question_text(example.question)
        return _whole(reader, question, len(question.encode()))
    if arm in TOKEN_BUDGET:
        return _cut_to_tokens(reader, example.text, budget, TOKEN_BUDGET[arm])
    if arm == "byte_budget_cut":
        text = cut_to_bytes(example.text, budget)
        return _whole(reader, text, len(text.encode()))
    if arm == "byte_budget_compressed":
        message = compress_to_bytes(example.text, budget)
        return _whole(reader, decompress(message) if message else "", len(message))
    raise ValueError(f"{arm} is no text arm")


def replay(arm: Arm, reader: Reader, texts: Sequence[str], calibrate: Calibration | None = None) -> Prompt:
    """The texts' own embeddings in the place of their tokens, content only.

    replay_raw: the embeddings of the whole prompt. replay_anchor: those of the text, as a prefix between the BOS and
    the anchor that latents have. replay_adapter: the same after the adapter's calibration, which must not hurt.
    """
    if arm == "replay_raw":
        rows = [reader.embed(reader.text_prompt(text, "content_only")) for text in texts]
        return Prompt(*_left_padded(rows), trained=False)
    rows = [reader.embed(reader.text_ids(text)) for text in texts]
    if arm == "replay_adapter":
        assert calibrate is not None
        rows = [calibrate(row[None])[0] for row in rows]
    embeddings, mask = _left_padded(rows)
    return reader.prompt_embeddings(Prefix(embeddings, mask))


def _whole(reader: Reader, text: str, size: int) -> TextPrompt:
    ids = reader.text_prompt(text)
    return TextPrompt(tuple(ids), size, len(ids) - len(reader.bos_ids) - len(reader.anchor_ids))


def _cut_to_tokens(reader: Reader, text: str, budget: int, style: PromptStyle) -> TextPrompt:
    """The first `budget` tokens of the text alone, or of the whole chat prompt, template included."""
    anchor = list(reader.anchor_ids)
    whole = reader.text_prompt(text, style)
    # A template writes its own BOS, which is content there: it takes a place of the budget.
    start = list(reader.bos_ids) if style == "content_only" else []
    content = whole[len(start) : len(whole) - len(anchor)][:budget]
    return TextPrompt((*start, *content, *anchor), len(reader.tokenizer.decode(content).encode()), len(content))


def _left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [tokens, hidden] as [batch, longest, hidden], and the mask [batch, longest]."""
    mask = [row.new_ones(len(row)).long() for row in rows]
    return (
        pad_sequence(list(rows), batch_first=True, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )
