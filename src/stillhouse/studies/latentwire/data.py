"""Reading-comprehension examples for the wire: the text that is sent, and each model's own tokens of its answer.

Stands between the split data set and training. A `WireBatch` keeps texts as text, since an encoder reads bytes or
its own tokens, and holds the gold answers once per reader, because two readers cut the same answer differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stillhouse.data.packing import NO_LABEL
from stillhouse.data.records import ReadingQuestion, read_reading_questions
from stillhouse.runtime.errors import UserError

AnswerTokeniser = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class WireExample:
    """A question about a passage. `text` is everything that is sent; `question` is the part that needs no passage.

    answers: all gold answers, empty where the passage does not answer the question (SQuAD 2).
    """

    id: str
    title: str
    text: str
    question: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The gold answer that is learned and whose likelihood is measured: the first; "" where there is none."""
        return self.answers[0] if self.answers else ""

    @property
    def text_bytes(self) -> int:
        """Length of the text on a wire, in UTF-8 bytes."""
        return len(self.text.encode())


def question_text(question: str) -> str:
    """The question as it stands at the start of every text, and alone where there is no passage."""
    return f"Question: {question.strip()}\n"


def wire_text(question: str, context: str) -> str:
    """What is sent. The question comes first: a text that is cut to a budget then loses passage, not question."""
    return f"{question_text(question)}Context: {context.strip()}\n"


def wire_example(record: ReadingQuestion) -> WireExample:
    """The example of one record of the data set."""
    text = wire_text(record.question, record.context)
    return WireExample(record.id, record.title, text, record.question, tuple(record.answers))


@dataclass(frozen=True)
class SplitExamples:
    """The examples of one split, and how many questions were left out because their text is too long."""

    examples: tuple[WireExample, ...]
    left_out: int


def read_examples(path: Path, limit: int | None = None, max_text_bytes: int | None = None) -> SplitExamples:
    """The first `limit` questions (None: all) of a split whose text has at most `max_text_bytes` (None: any).

    Raises `UserError` for a missing or damaged file, and where nothing is left.
    """
    examples = [wire_example(record) for record in read_reading_questions(path)]
    kept = [example for example in examples if max_text_bytes is None or example.text_bytes <= max_text_bytes]
    if not kept:
        shortest = min(example.text_bytes for example in examples)
        raise UserError(
            f"{path}: no text has at most {max_text_bytes} bytes (the shortest has {shortest}): raise max_text_bytes"
        )
    return SplitExamples(tuple(kept[:limit]), len(examples) - len(kept))


@dataclass(frozen=True)
class AnswerTokens:
    """The gold answers of a batch as one reader's tokens, padded on the right.

    input_ids: [batch, answer_tokens], 0 where padded. labels: the same with NO_LABEL (-100) where padded.
    attention_mask: [batch, answer_tokens], 1 for a token and 0 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @property
    def tokens(self) -> int:
        """Answer tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> AnswerTokens:
        """The same tokens on `device`."""
        return AnswerTokens(self.input_ids.to(device), self.labels.to(device), self.attention_mask.to(device))


def answer_tokens(rows: Sequence[Sequence[int]]) -> AnswerTokens:
    """Pad the answers of a batch; labels and mask come from lengths, never from ids (a pad id may be a real token)."""
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    input_ids = torch.zeros_like(attention_mask)
    input_ids[attention_mask.bool()] = torch.tensor([token for row in rows for token in row])
    return AnswerTokens(input_ids, input_ids.masked_fill(attention_mask == 0, NO_LABEL), attention_mask)


@dataclass(frozen=True)
class WireBatch:
    """The examples of one forward pass: their texts, and the targets of each reader by its name.

    prompt_tokens: positions that all readers together read before the answers (BOS, latents, anchor).
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    targets: Mapping[str, AnswerTokens]
    prompt_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the readers read, padding not counted."""
        return self.prompt_tokens + sum(target.tokens for target in self.targets.values())

    def to(self, device: torch.device) -> WireBatch:
        """The same batch with its tensors on `device`."""
        return replace(self, targets={name: target.to(device) for name, target in self.targets.items()})


class WireData:
    """Training data of a channel.

    tokenisers: per reader, from an answer to its tokens, the end of the answer included.
    prompt_tokens: positions per example that all readers together read before the answer.
    """

    def __init__(
        self, examples: Sequence[WireExample], tokenisers: Mapping[str, AnswerTokeniser], prompt_tokens: int = 0
    ) -> None:
        self.examples = list(examples)
        self.prompt_tokens = prompt_tokens
        self._answers = {
            name: [list(tokenise(example.answer)) for example in self.examples] for name, tokenise in tokenisers.items()
        }

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int]) -> WireBatch:
        """The examples of `indices` as one batch."""
        chosen = [self.examples[index] for index in indices]
        return WireBatch(
            ids=tuple(example.id for example in chosen),
            texts=tuple(example.text for example in chosen),
            targets={name: answer_tokens([rows[i] for i in indices]) for name, rows in self._answers.items()},
            prompt_tokens=self.prompt_tokens * len(chosen),
        )

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[WireBatch]:
        """Consecutive examples in rectangles of at most `token_budget` positions over all readers, on the CPU.

        Longer texts cost more in the encoder, which pads: their bytes count like positions. An example over the
        budget stands alone.
        """
        group: list[int] = []
        for index in indices:
            if group and self._positions([*group, index]) > token_budget:
                yield self.batch(group)
                group = []
            group.append(index)
        if group:
            yield self.batch(group)

    def _positions(self, indices: Sequence[int]) -> int:
        longest = sum(max(len(rows[index]) for index in indices) for rows in self._answers.values())
        text = max(self.examples[index].text_bytes for index in indices)
        return len(indices) * (self.prompt_tokens + longest + text)
