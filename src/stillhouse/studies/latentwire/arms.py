"""The arms: what a reader gets before the answer, as text cut or compressed to a budget, replayed or as latents.

Every arm ends in a `Presentation`, so that all of them are scored by the same code. A text arm is token ids first:
where two arms come to the same ids (a budget above the text's length), one computation serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.compression import compress_to_bytes, cut_to_bytes, decompress
from stillhouse.studies.latentwire.config import Arm
from stillhouse.studies.latentwire.data import WireExample, question_text
from stillhouse.studies.latentwire.reader import Prefix, Prompt, Reader
from stillhouse.studies.latentwire.run_settings import PromptStyle, RunSettings
from stillhouse.studies.latentwire.scoring import Presentation
from stillhouse.studies.latentwire.wire import unpack

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

    ids: the whole prompt. bytes: what is sent for it; None where it is cut by one reader's tokens, which no other
    reader could use. content: positions that carry it, without BOS and anchor.
    """

    ids: tuple[int, ...]
    bytes: int | None
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


def present_texts(reader: Reader, prompts: Sequence[TextPrompt]) -> Presentation:
    """Prompts of token ids."""
    return Presentation(
        lambda indices: reader.text_embeddings([prompts[index].ids for index in indices]),
        [prompt.content for prompt in prompts],
        [prompt.bytes for prompt in prompts],
    )


def present_replay(
    arm: Arm, reader: Reader, examples: Sequence[WireExample], calibrate: Calibration | None = None
) -> Presentation:
    """The texts' own embeddings in the place of their tokens; what is trained in a reader takes no part.

    replay_raw: the embeddings of the whole prompt, as `full_text` has it. replay_anchor: those of the text alone, in
    the place that latents have, between BOS and anchor. replay_adapter: the same after `calibrate`.
    """
    prompts = [text_prompt("full_text", reader, example) for example in examples]

    def render(indices: Sequence[int]) -> Prompt:
        if arm == "replay_raw":
            return Prompt(*_left_padded([reader.embed(prompts[index].ids) for index in indices]), trained=False)
        rows = [reader.embed(reader.text_ids(examples[index].text)) for index in indices]
        if arm == "replay_adapter":
            assert calibrate is not None
            rows = [calibrate(row[None])[0] for row in rows]
        return replace(reader.prompt_embeddings(Prefix(*_left_padded(rows))), layers=(), trained=False)

    return Presentation(render, [prompt.content for prompt in prompts], [None] * len(prompts))


def present_latents(
    reader: Reader, channel: Channel, messages: Sequence[bytes], prepared: Sequence[float] | float = 0.0
) -> Presentation:
    """What one reader makes of wire messages, which took `prepared` seconds: unpacked, and through its adapter."""

    def render(indices: Sequence[int]) -> Prompt:
        received = torch.stack([unpack(messages[index]) for index in indices]).to(reader.device)
        return reader.prompt_embeddings(channel.prefix(reader.name, channel.latents(received)))

    run: RunSettings = channel.run
    length = run.latent.per_model(len(channel.readers))
    return Presentation(render, [length] * len(messages), [len(message) for message in messages], prepared)


def _whole(reader: Reader, text: str, size: int) -> TextPrompt:
    ids = reader.text_prompt(text)
    start = len(reader.bos_ids) if ids[: len(reader.bos_ids)] == reader.bos_ids else 0
    return TextPrompt(tuple(ids), size, len(ids) - start - len(reader.anchor_ids))


def _cut_to_tokens(reader: Reader, text: str, budget: int, style: PromptStyle) -> TextPrompt:
    """The first `budget` tokens of the text alone, or of the whole chat prompt: a template takes its place in it."""
    anchor = list(reader.anchor_ids)
    whole = reader.text_prompt(text, style)
    start = list(reader.bos_ids) if style == "content_only" else []
    content = whole[len(start) : len(whole) - len(anchor)][:budget]
    return TextPrompt((*start, *content, *anchor), None, len(content))


def _left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [tokens, hidden] as [batch, longest, hidden], and the mask [batch, longest]."""
    mask = [row.new_ones(len(row)).long() for row in rows]
    return (
        pad_sequence(list(rows), batch_first=True, padding_side="left"),
        pad_sequence(mask, batch_first=True, padding_side="left"),
    )
