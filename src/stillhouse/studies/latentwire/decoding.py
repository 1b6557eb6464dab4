"""Greedy decoding of short answers from prompts that are embeddings, with a key-value cache.

Stands below `Reader.generate`. An answer ends at an end token or at the end of its first line, for every arm alike.
The first token may be drawn instead of taken (top-p, temperature), and an empty answer forbidden: both are off by
default and exist to reproduce published runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stillhouse.runtime.seeds import generator
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.prompt import ReadPrompt

if TYPE_CHECKING:
    from stillhouse.studies.latentwire.reader import Reader


@torch.no_grad()
def decode_answers(reader: Reader, read: ReadPrompt, settings: AnswerGenerationSettings) -> list[str]:
    """One answer per row of the prompt, stripped; at most `max_new_tokens` tokens."""
    prompt, mask = read.prompt, read.prompt.attention_mask
    tokens = first_tokens(read.first_logits, reader.stop_ids, settings)
    written: list[list[int]] = [[] for _ in range(len(prompt))]
    answers: list[str | None] = [None] * len(prompt)
    for step in range(1, settings.max_new_tokens + 1):
        for row, token in enumerate(tokens.tolist()):
            if answers[row] is None:
                answers[row] = _ended(reader, written[row], token)
        if step == settings.max_new_tokens or None not in answers:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        tokens = reader.next_logits(tokens, mask, prompt, read.cache).argmax(dim=-1)
    return [_text(reader, ids) if answer is None else answer for ids, answer in zip(written, answers, strict=True)]


def first_tokens(logits: Tensor, stop_ids: tuple[int, ...], settings: AnswerGenerationSettings) -> Tensor:
    """The answers' first tokens [batch] from logits [batch, vocabulary]: the largest, or drawn from a nucleus."""
    logits = logits.float()
    if settings.ban_first_eos:
        logits = logits.index_fill(1, torch.tensor(stop_ids, device=logits.device), -torch.inf)
    if settings.first_token_temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / settings.first_token_temperature).softmax(dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    # A token is in the nucleus if those before it do not fill it: at least one always is.
    nucleus = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.first_token_top_p, 0)
    drawn = torch.multinomial(nucleus.cpu(), 1, generator=generator(settings.seed, "first token"))
    return ids.gather(1, drawn.to(ids.device))[:, 0]


def _ended(reader: Reader, written: list[int], token: int) -> str | None:
    """The answer, if `token` ends it; otherwise `written` grows by the token."""
    if token in reader.stop_ids:
        return _text(reader, written)
    written.append(token)
    return _text(reader, written) if "\n" in _decoded(reader, written).lstrip() else None


def _text(reader: Reader, ids: list[int]) -> str:
    return _decoded(reader, ids).strip().partition("\n")[0].strip()


def _decoded(reader: Reader, ids: list[int]) -> str:
    text = reader.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
