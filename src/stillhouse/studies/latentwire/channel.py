"""The trained module: an encoder from text to Z, and one adapter per reader from Z to its embedding space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from stillhouse.studies.latentwire.config import RunSettings
from stillhouse.studies.latentwire.reader import Prefix, Reader


@dataclass(frozen=True)
class Latents:
    """Z of a batch: what all readers share, and each reader's own.

    shared: [batch, M_shared, d_z]. private: per model [batch, M_private, d_z], of length 0 where there are none.
    """

    shared: Tensor
    private: Mapping[str, Tensor]

    def message(self) -> Tensor:
        """What goes over the wire: [batch, M, d_z], shared vectors first, then each model's in the pair's order."""
        raise NotImplementedError

    def of_model(self, name: str) -> Tensor:
        """What one reader gets: [batch, M_shared + M_private, d_z]."""
        raise NotImplementedError


class Channel(nn.Module):
    """Encoder and adapters; its readers are part of it, frozen.

    Readers may be shared by several channels, but serve the one that was built or loaded last: a channel that trains
    parts of them (LoRA, prefix tuning) puts these into them.
    """

    readers: Mapping[str, Reader]

    @classmethod
    def build(
        cls,
        run: RunSettings,
        readers: Mapping[str, Reader],
        seed: int,
        encoder_path: Path | None = None,
        train_texts: Sequence[str] = (),
    ) -> Self:
        """A new channel. encoder_path: the model directory of encoder kind sentence. train_texts: for train_stats."""
        raise NotImplementedError

    @classmethod
    def load(
        cls, checkpoint: Path, run: RunSettings, readers: Mapping[str, Reader], encoder_path: Path | None = None
    ) -> Self:
        """A trained channel in evaluation mode, from `checkpoint-<step>/`; UserError where it is damaged or of others."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> Latents:
        """Z of each text. Raises UserError for a text that the encoder cannot take whole."""
        raise NotImplementedError

    def latents(self, message: Tensor) -> Latents:
        """The other side of the wire: from [batch, M, d_z]; UserError for another shape."""
        raise NotImplementedError

    def prefix(self, model_name: str, latents: Latents) -> Prefix:
        """What `model_name` reads in the text's place; `.embeddings` is [batch, M, hidden]."""
        raise NotImplementedError
