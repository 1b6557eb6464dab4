"""The lens: one language model in three roles, joined by text. (Signatures; the bodies follow.)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.config.training import Precision
from stillhouse.studies.consistency_lens.config import LensSettings


@dataclass(frozen=True)
class Explanation:
    """token_ids: [batch, T]. embeddings: [batch, T, hidden], what the encoder reads. logits: [batch, T, vocabulary]."""

    token_ids: Tensor
    embeddings: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Reading:
    """Documents up to the token before the chosen one, as the original has read them (keys and values), and that token."""


class Lens(nn.Module):
    """original: the frozen model. Everything else is private to training."""

    original: PreTrainedModel

    @classmethod
    def build(
        cls, model_dir: Path, settings: LensSettings, precision: Precision, device: object = None, trust_remote_code: bool = False
    ) -> Self:
        """A new lens: identity projections, prompts from their texts. UserError: layer out of range, no bitsandbytes."""
        raise NotImplementedError

    @classmethod
    def load(
        cls, model_dir: Path, checkpoint: Path, settings: LensSettings, precision: Precision, device: object = None, trust_remote_code: bool = False
    ) -> Self:
        """The lens of a checkpoint, in evaluation mode; its trained parts in the model's dtype."""
        raise NotImplementedError

    def explain(self, activations: Tensor, *, temperature: float = 1.0, gumbel_noise: bool = True, length: int | None = None) -> Explanation:
        """Straight-through text of [batch, hidden]; noise from torch's global generator; greedy without noise."""
        raise NotImplementedError

    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """[batch, T, hidden] -> [batch, hidden] float32."""
        raise NotImplementedError

    def reconstruct_tokens(self, token_ids: Tensor) -> Tensor:
        """[batch, T] -> [batch, hidden] float32."""
        raise NotImplementedError

    def activations_of(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Residual stream after `layer` at `positions` [batch]: [batch, hidden] float32. Right-padded input, no gradient."""
        raise NotImplementedError

    def read(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Reading:
        """Read documents once, for several `next_token_logits`. No gradient."""
        raise NotImplementedError

    def next_token_logits(self, reading: Reading, activations: Tensor | None = None) -> Tensor:
        """Original's logits after the chosen token [batch, vocabulary]; with `activations` swapped in at `layer`."""
        raise NotImplementedError

    def original_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, activations: Tensor | None = None) -> Tensor:
        """`read` and `next_token_logits` in one."""
        raise NotImplementedError
