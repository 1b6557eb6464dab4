"""Forward passes that compute a shared prompt prefix once and hand only the wanted rows to the lm_head.

Few-shot prompts with fixed shots agree in their first thousand tokens. `encode_prefix` runs those once and
keeps their keys and values; `suffix_logits` runs what differs, many sequences at a time. The result equals the
plain forward pass but for rounding. Evaluation (gold NLL) and the teacher cache both stand on it.

Suffixes are padded on the right and need no attention mask: attention is causal, no real token sees padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from stillhouse.runtime.errors import UserError


class _FrozenLayer(CacheLayerMixin):
    """One layer's prefix keys and values, [1, heads, prefix, head_dim], that a forward pass never changes.

    `update` hands the pass prefix and suffix joined, and forgets the suffix: the prefix serves any number of
    batches of any size, and only one layer's copy per batch row is alive at a time.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.layer, self.is_sliding = layer, layer.is_sliding
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is born with its prefix."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return prefix and suffix joined, [batch, heads, kept prefix + suffix, head_dim]; keep nothing."""
        batch = key_states.shape[0]
        keys = torch.cat([self.layer.keys.expand(batch, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self.layer.values.expand(batch, -1, -1, -1), value_states], dim=-2)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of keys as the wrapped layer counts them (a sliding window drops the oldest)."""
        return self.layer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Tokens of the prefix."""
        return self.layer.get_seq_length()

    def get_max_length(self) -> int:
        """Longest sequence the wrapped layer holds."""
        return self.layer.get_max_length()


@dataclass(frozen=True)
class PrefixState:
    """A prefix that the model has read: its token ids and its frozen keys and values."""

    token_ids: tuple[int, ...]
    cache: Cache

    def __len__(self) -> int:
        """Tokens of the prefix."""
        return len(self.token_ids)


@torch.no_grad()
def encode_prefix(model: nn.Module, prefix_ids: Sequence[int]) -> PrefixState | None:
    """Run the prefix once and keep its keys and values; an empty prefix is None.

    Raises UserError where the model's cache is not plain (sliding-window) attention and cannot be shared.
    """
    if not prefix_ids:
        return None
    cache = DynamicCache(config=model.config)
    input_ids = torch.tensor([list(prefix_ids)], device=_device(model))
    with lm_head_rows(model, torch.empty(0, dtype=torch.long, device=input_ids.device)):
        model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise UserError(
            f"{type(model).__name__} keeps {', '.join(kinds)}, which cannot be shared between sequences: "
            "compute this model without a shared prefix"
        )
    return PrefixState(tuple(prefix_ids), Cache(layers=[_FrozenLayer(layer) for layer in cache.layers]))


def suffix_logits(
    model: nn.Module,
    suffixes: Sequence[Sequence[int]],
    starts: Sequence[int],
    prefix: PrefixState | None = None,
) -> list[Tensor]:
    """Logits of each suffix from column `starts[i]` to its last: one [len(suffix) - start, vocab] per suffix.

    Row j of a result predicts the token after suffix column `starts[i] + j`; only these rows pass through the
    lm_head. To score an answer that begins at column a of the suffix take `starts[i] = a - 1` and drop the last
    row; the prefix must end before column a - 1, which `shared_prefix_length` sees to. Gradients flow through
    the suffixes unless the caller disables them, never into the prefix.
    """
    rows, counts = _wanted_rows(suffixes, starts)
    logits, _ = _forward_rows(model, suffixes, rows, prefix)
    return list(logits.split(counts))


def suffix_hidden_states(
    model: nn.Module,
    suffixes: Sequence[Sequence[int]],
    starts: Sequence[int],
    prefix: PrefixState | None = None,
) -> list[Tensor]:
    """What the lm_head would read for `suffix_logits`: one [len(suffix) - start, hidden] per suffix."""
    rows, counts = _wanted_rows(suffixes, starts)
    _, hidden = _forward_rows(model, suffixes, rows, prefix, stop_before_lm_head=True)
    return list(hidden.split(counts))


def shared_prefix_length(sequences: Sequence[Sequence[int]], answer_starts: Sequence[int]) -> int:
    """Length of the longest token prefix that all sequences share and that ends before every wanted row.

    The first wanted row of sequence i, column `answer_starts[i] - 1`, predicts the answer's first token.
    """
    limit = min(answer_starts, default=1) - 1
    ordered = sorted(map(list, sequences)) or [[]]
    first, last = ordered[0], ordered[-1]  # in lexical order, the others lie between
    different = (column for column in range(limit) if first[column] != last[column])
    return max(0, next(different, limit))


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped, longest first, so that rows times longest length stays within `batch_tokens`.

    A sequence longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _wanted_rows(suffixes: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Indices of the wanted rows in the flattened [batch * longest] grid, and their number per suffix."""
    for suffix, start in zip(suffixes, starts, strict=True):
        if not 0 <= start < len(suffix):
            raise ValueError(f"first wanted row {start} lies outside a suffix of {len(suffix)} tokens")
    longest = max(map(len, suffixes))
    rows = [torch.arange(i * longest + starts[i], i * longest + len(suffixes[i])) for i in range(len(suffixes))]
    return torch.cat(rows), [len(row) for row in rows]


def _forward_rows(
    model: nn.Module,
    suffixes: Sequence[Sequence[int]],
    rows: Tensor,
    prefix: PrefixState | None,
    *,
    stop_before_lm_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run right-padded suffixes after the prefix; return logits [rows, vocab] and hidden [rows, hidden]."""
    device = _device(model)
    longest, offset = max(map(len, suffixes)), len(prefix) if prefix else 0
    input_ids = torch.zeros(len(suffixes), longest, dtype=torch.long)
    for row, suffix in enumerate(suffixes):
        input_ids[row, : len(suffix)] = torch.tensor(suffix)
    position_ids = torch.arange(offset, offset + longest, device=device).expand(len(suffixes), -1)
    with lm_head_rows(model, rows.to(device), stop_before_lm_head) as captured:
        output = model(
            input_ids=input_ids.to(device),
            position_ids=position_ids,
            past_key_values=prefix.cache if prefix else None,
            use_cache=prefix is not None,
        )
    return output.logits.flatten(0, 1), captured[0]


@contextmanager
def lm_head_rows(model: nn.Module, rows: Tensor, stop_before_lm_head: bool = False) -> Iterator[list[Tensor]]:
    """Let only `rows` of the flattened [batch * columns, hidden] grid, or none, into the lm_head.

    A hook on its input instead of `logits_to_keep`: rows may differ between sequences, and whatever a model does
    to its logits afterwards (scaling, soft capping) still happens. The list holds those rows' hidden states.
    """
    captured: list[Tensor] = []

    def keep_rows(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0].flatten(0, 1).index_select(0, rows)
        captured.append(hidden)
        return (hidden[None, :0] if stop_before_lm_head else hidden[None], *arguments[1:])

    output_embeddings: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # of every causal model
    handle = output_embeddings.register_forward_pre_hook(keep_rows)
    try:
        yield captured
    finally:
        handle.remove()
