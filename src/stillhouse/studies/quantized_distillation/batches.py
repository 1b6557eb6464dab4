"""The student's training data: prompts and answers in micro-batches that leave room for the answers it may sample."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items

from stillhouse.data.packing import AnswerBatch, Sequence, pack, pad


class StudentData:
    """Sequences as the training loop takes them, packed or padded.

    sampled_tokens: the longest answer that a step may put in the place of an example's own; 0 where none does. The
    token budget counts whichever is longer, so that it bounds memory in either kind of step.
    """

    def __init__(self, sequences: Items[Sequence], *, packing: bool = True, sampled_tokens: int = 0) -> None:
        self.sequences, self.packing, self.sampled_tokens = sequences, packing, sampled_tokens

    def __len__(self) -> int:
        return len(self.sequences)

    def micro_batches(self, indices: Items[int], token_budget: int) -> Iterator[AnswerBatch]:
        """The examples of `indices`, in order, at most `token_budget` tokens (padding counted) at a time."""
        group: list[Sequence] = []
        for sequence in (self.sequences[index] for index in indices):
            if group and self._size([*group, sequence]) > token_budget:
                yield collate(group, packing=self.packing)
                group = []
            group.append(sequence)
        if group:
            yield collate(group, packing=self.packing)

    def _size(self, sequences: Items[Sequence]) -> int:
        """Tokens of one forward pass; sampling pads its prompts, whatever the loss does."""
        own = [len(sequence) for sequence in sequences]
        size = sum(own) if self.packing else max(own) * len(own)
        if self.sampled_tokens:
            size = max(size, (max(sequence.answer_start for sequence in sequences) + self.sampled_tokens) * len(own))
        return size


def collate(sequences: Items[Sequence], *, packing: bool) -> AnswerBatch:
    """One forward pass over these sequences."""
    return pack(sequences) if packing else pad(sequences)
