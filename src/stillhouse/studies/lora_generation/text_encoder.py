"""Prompts as the generator sees them: embeddings of a frozen sentence encoder, cached per prompt text.

`states: sentence` gives one mean-pooled vector per prompt, `tokens` the states of its first `length` tokens, zeros
behind the end. Embeddings depend on the encoder and the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from stillhouse.studies.lora_generation.config import TextSettings


class PromptEncoder:
    """The frozen encoder with its settings."""

    def __init__(self, path: Path, settings: TextSettings) -> None:
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        raise NotImplementedError

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Conditions [prompts, vectors, width] fp32: `vectors` is 1 for states sentence, else `length`."""
        raise NotImplementedError
