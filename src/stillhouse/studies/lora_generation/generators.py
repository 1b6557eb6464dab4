"""Generators: from the embeddings of a handful of prompts to the tensors of an adapter.

Two decoders: `compact`, a residual network per layer and matrix with heads shared over layers, and
`hyper_convolution`, Drag-and-Drop's cascade of convolutions over the axes of a token grid (arXiv 2506.16406).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from stillhouse.models.lora_tensors import AdapterTensors
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder


class Generator(nn.Module):
    """Prompt embeddings to adapters of one layout."""

    def forward(self, conditions: Tensor) -> AdapterTensors:
        """A batch of adapters for conditions [batch, prompts, vectors, width]."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[str], encoder: PromptEncoder) -> AdapterTensors:
        """One adapter for the prompts (the first that the generator's settings read), without gradients."""
        raise NotImplementedError


def load_generator(checkpoint: Path) -> Generator:
    """A generator from `checkpoint-<step>/`, in evaluation mode; its settings stand beside the checkpoints.

    Raises `UserError` for a directory that holds none or is damaged.
    """
    raise NotImplementedError
