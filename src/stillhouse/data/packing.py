"""Collation of prompt-and-answer sequences, packed or padded: only answer rows reach the output embeddings.

A `Sequence` is a prompt followed by its answer. `pack` concatenates sequences into one row whose
`position_ids` restart at each of them: transformers then builds a block-diagonal causal mask from the
positions, provided that there is neither an attention mask nor a cache. `pad` puts them on the left-padded
rows of a rectangle. Both give the same answer rows in the same order: an objective need not know which form
it got. Labels come from lengths, never from `ids == pad` (the pad token may be the end-of-sequence token).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

NO_LABEL = -100
Rows = Literal["predicting", "with_last"]


@dataclass(frozen=True)
class Sequence:
    """A prompt and its answer: `input_ids[answer_start:]` are the answer's tokens."""

    input_ids: list[int]
    answer_start: int
    example_id: str

    def __post_init__(self) -> None:
        if not 0 < self.answer_start < len(self.input_ids):
            raise ValueError(f"{self.example_id}: a sequence needs at least one prompt and one answer token")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the answer."""
        return self.input_ids[: self.answer_start]

    @property
    def answer_ids(self) -> list[int]:
        """The tokens that are learned, the end of the turn included."""
        return self.input_ids[self.answer_start :]

    def logit_positions(self, rows: Rows = "predicting") -> range:
        """Positions whose logits predict the answer; `with_last` adds that of the last answer token."""
        return range(self.answer_start - 1, len(self) - (rows == "predicting"))


@dataclass(frozen=True)
class AnswerBatch:
    """Sequences ready for one forward pass, and where their R answer rows are; see `pack` and `pad`.

    input_ids, position_ids: [batch, time]. attention_mask: [batch, time], or None where sequences are packed.
    logit_columns: [columns], the positions (of every row of the batch) that reach the output embeddings.
    logit_rows: [R], where an answer row is among the flattened `batch * columns` logits.
    labels: [R], the token that the row predicts; NO_LABEL for the row after the last answer token.
    example_of_row: [R], index of the row's sequence among `sequences`.
    """

    sequences: tuple[Sequence, ...]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    logit_columns: Tensor
    logit_rows: Tensor
    labels: Tensor
    example_of_row: Tensor

    @property
    def answer_tokens(self) -> int:
        """The number of answer tokens, which normalises the loss."""
        return sum(len(sequence) - sequence.answer_start for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        """The number of tokens of the sequences, padding not counted."""
        return sum(map(len, self.sequences))

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch with its tensors on `device`."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **moved)


def micro_batches(
    sequences: Iterable[Sequence], token_budget: int, *, padded: bool = False
) -> Iterator[list[Sequence]]:
    """Group sequences, in order, into micro-batches of at most `token_budget` tokens.

    `padded` counts the rectangle that `pad` makes. A sequence longer than the budget stands alone: the budget
    bounds memory, it never drops or cuts anything.
    """
    group: list[Sequence] = []
    for sequence in sequences:
        lengths = [*map(len, group), len(sequence)]
        size = max(lengths) * len(lengths) if padded else sum(lengths)
        if group and size > token_budget:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def pack(sequences: Iterable[Sequence], rows: Rows = "predicting") -> AnswerBatch:
    """Concatenate sequences into one row [1, T]; positions restart at each sequence and keep them apart."""
    sequences = tuple(sequences)
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence))
    columns = [
        offset + position
        for offset, sequence in zip(offsets, sequences, strict=False)
        for position in sequence.logit_positions(rows)
    ]
    return AnswerBatch(
        sequences,
        input_ids=torch.tensor([list(chain.from_iterable(sequence.input_ids for sequence in sequences))]),
        position_ids=torch.tensor([list(chain.from_iterable(range(len(sequence)) for sequence in sequences))]),
        attention_mask=None,
        logit_columns=torch.tensor(columns),
        logit_rows=torch.arange(len(columns)),
        labels=_labels(sequences, rows),
        example_of_row=_example_of_row(sequences, rows),
    )


def pad(sequences: Iterable[Sequence], rows: Rows = "predicting", pad_id: int = 0) -> AnswerBatch:
    """Put each sequence on its own row [B, T], padded on the left: all answers end in the last column."""
    sequences = tuple(sequences)
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id)
    position_ids = torch.zeros_like(input_ids)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence)
        input_ids[row, start:] = torch.tensor(sequence.input_ids)
        position_ids[row, start:] = torch.arange(len(sequence))
        attention_mask[row, start:] = 1
    positions = [
        [longest - len(sequence) + position for position in sequence.logit_positions(rows)] for sequence in sequences
    ]
    first = min(chain.from_iterable(positions))
    columns = range(first, 1 + max(chain.from_iterable(positions)))
    return AnswerBatch(
        sequences,
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        logit_columns=torch.tensor(columns),
        logit_rows=torch.tensor(
            [row * len(columns) + column - first for row, own in enumerate(positions) for column in own]
        ),
        labels=_labels(sequences, rows),
        example_of_row=_example_of_row(sequences, rows),
    )


def answer_rows_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Logits of the answer rows, [R, vocab]; only these positions reach the output embeddings.

    `use_cache=False` is needed, not only thrifty: with a cache transformers ignores packed positions.
    """
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.logit_columns,
        use_cache=False,
    ).logits
    return logits.flatten(0, 1)[batch.logit_rows]


def _labels(sequences: tuple[Sequence, ...], rows: Rows) -> Tensor:
    unlabelled = [NO_LABEL] if rows == "with_last" else []
    return torch.tensor([label for sequence in sequences for label in [*sequence.answer_ids, *unlabelled]])


def _example_of_row(sequences: tuple[Sequence, ...], rows: Rows) -> Tensor:
    counts = torch.tensor([len(sequence.logit_positions(rows)) for sequence in sequences])
    return torch.arange(len(sequences)).repeat_interleave(counts)
