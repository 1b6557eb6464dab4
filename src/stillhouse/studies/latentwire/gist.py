"""The gist head: a small decoder that reads the text's first bytes off Z alone, so that Z must keep them.

An auxiliary loss of training; nothing else uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillhouse.data.packing import NO_LABEL


class GistDecoder(nn.Module):
    """One learned query per byte position attends to Z; a linear layer gives the byte. dimension: d_z."""

    def __init__(self, dimension: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.queries = nn.Parameter(torch.randn(length, dimension) / math.sqrt(dimension))
        self.attention = nn.MultiheadAttention(dimension, 1, batch_first=True)
        self.to_bytes = nn.Sequential(nn.LayerNorm(dimension), nn.Linear(dimension, 256))

    def forward(self, message: Tensor) -> Tensor:
        """Logits of the first bytes, [batch, length, 256], from Z [batch, M, d_z]."""
        queries = self.queries.expand(len(message), -1, -1)
        read, _ = self.attention(queries, message, message, need_weights=False)
        logits: Tensor = self.to_bytes(queries + read)
        return logits

    def loss(self, message: Tensor, texts: Sequence[str]) -> Tensor:
        """Cross entropy per example, [batch], in nats per byte."""
        labels = torch.full((len(texts), self.length), NO_LABEL)
        for row, text in enumerate(texts):
            data = list(text.encode()[: self.length])
            labels[row, : len(data)] = torch.tensor(data)
        labels = labels.to(message.device)
        losses = functional.cross_entropy(
            self(message).float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none"
        ).view_as(labels)
        return losses.sum(1) / (labels != NO_LABEL).sum(1).clamp(min=1)
