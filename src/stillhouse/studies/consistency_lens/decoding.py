"""Forward passes that continue from keys and values as plain tensors: differentiable, and never changed in place.

The decoder feeds its own tokens back through them, and the original reads a document once for several last tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Keys and values of each layer in turn, [batch, heads, tokens, head_dim].
KeyValues = tuple[Tensor, ...]


def extend(
    model: PreTrainedModel,
    past: KeyValues,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> tuple[Tensor, KeyValues]:
    """Read further tokens after `past`: logits after the last one, [batch, vocabulary], and what is now the past.

    attention_mask: [batch, past and new tokens]. Raises nothing of its own; `past` may be empty.
    """
    cache = DynamicCache(_pairs(past) if past else None, config=model.config)
    output = model(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def for_batch(past: KeyValues, batch: int) -> KeyValues:
    """The keys and values of one sequence for each row of a batch; gradients add up."""
    return tuple(tensor.expand(batch, -1, -1, -1) for tensor in past)


def until(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row up to its position, aligned so that the position is the last column.

    Returns input_ids, attention_mask and position_ids, [batch, longest].
    """
    longest = int(positions.max()) + 1
    columns = positions[:, None] - torch.arange(longest - 1, -1, -1, device=positions.device)
    inside = columns >= 0
    columns = columns.clamp(min=0)
    return input_ids.gather(1, columns), attention_mask.gather(1, columns) * inside, columns


def _pairs(past: KeyValues) -> list[tuple[Tensor, Tensor]]:
    return list(zip(past[::2], past[1::2], strict=True))
