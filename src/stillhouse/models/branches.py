"""Forward passes over texts that branch: a stem that several continuations share is computed once.

The choices of a multiple-choice item agree in their question. A row of the batch is one item: the stem, then every
branch, whose positions restart where the stem ends and whose attention sees the stem and itself. The logits equal
those of the plain forward passes but for rounding. A prefix that all items share (solved examples) goes before, as in
`models.prefix`. Models whose attention takes no mask of our own are served row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.prefix import PrefixState, lm_head_rows, shared_prefix_length, suffix_logits

MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Branches:
    """Token sequences (after the prefix, where there is one) and the column at which each one's wanted part begins.

    Raises `ValueError` for a wanted part that is empty or has nothing before it.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a wanted part that no logit predicts."""
        for ids, start in zip(self.sequences, self.starts, strict=True):
            if not 0 < start < len(ids):
                raise ValueError(f"the wanted part begins at {start} in a sequence of {len(ids)} tokens")

    @property
    def stem(self) -> int:
        """Tokens that all sequences share, none of whose logits is wanted."""
        return shared_prefix_length(self.sequences, self.starts)

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return self.stem + sum(len(ids) - self.stem for ids in self.sequences)


def branch_logits(
    model: PreTrainedModel, rows: Sequence[Branches], prefix: PrefixState | None = None
) -> list[list[Tensor]]:
    """Logits that predict each sequence's wanted tokens, [len(sequence) - start, vocabulary], by row and sequence.

    Only these positions pass through the lm_head.
    """
    if not takes_own_masks(model):
        return [_plain_logits(model, row, prefix) for row in rows]
    device = next(model.parameters()).device
    offset = len(prefix) if prefix else 0
    layouts = [_Layout.of(row) for row in rows]
    longest = max(len(layout.ids) for layout in layouts)
    ids, positions = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no row is empty
    for number, layout in enumerate(layouts):
        length = len(layout.ids)
        ids[number, :length] = torch.tensor(layout.ids)
        positions[number, :length] = torch.tensor(layout.positions) + offset
        branch = torch.tensor(layout.branch)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen[number, :length, :length] = causal & ((branch[None, :] == branch[:, None]) | (branch[None, :] == 0))
    seen = torch.cat([torch.ones(len(rows), longest, offset, dtype=torch.bool), seen], dim=-1)
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    wanted = torch.tensor([number * longest + column for number, row in enumerate(layouts) for column in row.wanted])
    with lm_head_rows(model, wanted.to(device)):
        logits = model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask[:, None].to(device),
            past_key_values=prefix.cache if prefix else None,
            use_cache=prefix is not None,
        ).logits.flatten(0, 1)
    found = iter(logits.split([count for layout in layouts for count in layout.counts]))
    return [[next(found) for _ in layout.counts] for layout in layouts]


def takes_own_masks(model: PreTrainedModel) -> bool:
    """Whether the model's attention reads a mask as it is: no fused kernel without one, no sliding window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None) is not None and kinds != {"full_attention"}
    return config._attn_implementation in MASKED_ATTENTION and not sliding


@dataclass(frozen=True)
class _Layout:
    """One row: each column's id, position and branch (0: the stem); the wanted columns, branch after branch."""

    ids: list[int]
    positions: list[int]
    branch: list[int]
    wanted: list[int]
    counts: list[int]

    @classmethod
    def of(cls, row: Branches) -> _Layout:
        stem = row.stem
        ids, positions, branch = list(row.sequences[0][:stem]), list(range(stem)), [0] * stem
        wanted: list[int] = []
        for number, (sequence, start) in enumerate(zip(row.sequences, row.starts, strict=True), start=1):
            first = len(ids)
            ids += sequence[stem:]
            positions += range(stem, len(sequence))
            branch += [number] * (len(sequence) - stem)
            wanted += range(first + start - 1 - stem, first + len(sequence) - 1 - stem)
        counts = [len(sequence) - start for sequence, start in zip(row.sequences, row.starts, strict=True)]
        return cls(ids, positions, branch, wanted, counts)


def _plain_logits(model: PreTrainedModel, row: Branches, prefix: PrefixState | None) -> list[Tensor]:
    """The same, each sequence by itself."""
    logits = suffix_logits(model, row.sequences, [start - 1 for start in row.starts], prefix)
    return [one[:-1] for one in logits]
