"""A frozen sentence encoder such as MiniLM: token states from `AutoModel`, averaged where one vector is wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.loading import check_weights, frozen, load_tokenizer


def load_sentence_encoder(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen encoder in fp32 and its tokenizer. Raises `UserError` for a directory that is missing or damaged."""
    check_weights(path)
    model: PreTrainedModel = AutoModel.from_pretrained(
        path, use_safetensors=True, local_files_only=True, dtype=torch.float32
    )
    return frozen(model), load_tokenizer(path)


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean state of each row's real tokens, [rows, width]; states [rows, tokens, width], mask 0 where padded."""
    weights = mask.to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
