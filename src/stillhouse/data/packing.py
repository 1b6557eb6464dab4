"""Collation of prompt-and-answer sequences, packed or padded: only answer rows reach the output embeddings.

A `Sequence` is a prompt followed by its answer. `pack` puts sequences one after another into rows whose
`position_ids` restart at each of them: transformers then builds a block-diagonal causal mask from the
positions, provided that there is neither an attention mask nor a cache. `pad` puts each on a left-padded row
of its own. Both give the same answer rows in the same order: an objective need not know which form
it got. Labels come from lengths, never from `ids == pad` (the pad token may be the end-of-sequence token).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

NO_LABEL = -100
# Attention computes the square of a packed row, also between sequences that cannot see each other: one row of 8,192
# tokens would cost a model of width 2,048 two thirds of its projections again, rows of 512 cost a twentieth.
ROW_TOKENS = 512
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
    logit_rows: [R], where an answer row is among the flattened `batch * time` positions.
    labels: [R], the token that the row predicts; NO_LABEL for the row after the last answer token.
    example_of_row: [R], index of the row's sequence among `sequences`.
    """

    sequences: tuple[Sequence, ...]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
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


def pack(sequences: Iterable[Sequence], rows: Rows = "predicting", row_tokens: int = ROW_TOKENS) -> AnswerBatch:
    """Put sequences one after another into rows of about `row_tokens`, [rows, T].

    What is left of a row at its end carries on the last sequence, which cannot see it.
    """
    sequences = tuple(sequences)
    layout = _layout([len(sequence) for sequence in sequences], row_tokens)
    longest = max(sum(len(sequences[place]) for place in row) for row in layout)
    input_ids = torch.zeros(len(layout), longest, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    starts = [0] * len(sequences)
    for number, row in enumerate(layout):
        column = 0
        for place in row:
            length = len(sequences[place])
            input_ids[number, column : column + length] = torch.tensor(sequences[place].input_ids)
            position_ids[number, column:] = torch.arange(longest - column)
            starts[place] = number * longest + column
            column += length
    return _answer_batch(sequences, rows, starts, input_ids, position_ids)


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
    starts = [(row + 1) * longest - len(sequence) for row, sequence in enumerate(sequences)]
    return _answer_batch(sequences, rows, starts, input_ids, position_ids, attention_mask)


def answer_rows_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Logits of the answer rows, [R, vocab]; only these positions reach the output embeddings.

    `use_cache=False` is needed, not only thrifty: with a cache transformers ignores packed positions.
    """

    def keep_rows(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0].flatten(0, 1)[batch.logit_rows][None], *arguments[1:])

    # A hook and not `logits_to_keep`, which takes the same columns of every row.
    output_embeddings: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # of every causal model
    handle = output_embeddings.register_forward_pre_hook(keep_rows)
    try:
        logits: Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits
    finally:
        handle.remove()
    return logits[0]


def _layout(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """The places of the sequences in each row: as many rows as leave at most a tenth of their rectangle unfilled."""
    total = sum(lengths)
    for count in range(-(-total // max(row_tokens, *lengths)), 0, -1):
        layout: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            row = filled.index(min(filled))
            layout[row].append(place)
            filled[row] += lengths[place]
        if count * max(filled) <= 1.1 * total:
            break
    return layout


def _answer_batch(
    sequences: tuple[Sequence, ...],
    rows: Rows,
    starts: list[int],
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> AnswerBatch:
    """The batch of sequences that begin at `starts` among the flattened positions."""
    positions = [sequence.logit_positions(rows) for sequence in sequences]
    return AnswerBatch(
        sequences,
        input_ids,
        position_ids,
        attention_mask,
        logit_rows=torch.tensor([start + place for start, own in zip(starts, positions, strict=True) for place in own]),
        labels=_labels(sequences, rows),
        example_of_row=torch.arange(len(sequences)).repeat_interleave(torch.tensor([len(own) for own in positions])),
    )


def _labels(sequences: tuple[Sequence, ...], rows: Rows) -> Tensor:
    unlabelled = [NO_LABEL] if rows == "with_last" else []
    return torch.tensor([label for sequence in sequences for label in [*sequence.answer_ids, *unlabelled]])
