"""Encoders: from a text to Z, [M, d_z].

Three kinds: a transformer over UTF-8 bytes and a frozen sentence encoder, whose states learned queries pool, and a
reader's own model with a LoRA, which appends its learned queries to the text and reads Z off them (arXiv 2307.06945).
A text must fit whole. Padding never reaches Z.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.models.lora import add_lora
from stillhouse.models.sentence_encoder import load_sentence_encoder
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import EncoderSettings, LatentSettings

BYTE_PADDING = 256


@dataclass(frozen=True)
class Fit:
    """How many of `texts` are over `limit` units, and the longest text's length."""

    texts: int
    cut: int
    longest: int
    limit: int


class TextEncoder(nn.Module):
    """What all kinds share: the limit on a text's length. `units` names what it counts."""

    units = "tokens"

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Z of each text, [batch, M, d_z]."""
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """The text as the encoder's own units."""
        raise NotImplementedError

    def check(self, texts: Sequence[str], split: str) -> Fit:
        """Count the texts of a split that would be cut; UserError where they are more than the settings allow."""
        lengths = [len(self.ids(text)) for text in texts]
        limit = self.settings.max_length
        fit = Fit(len(texts), sum(length > limit for length in lengths), max(lengths, default=0), limit)
        allowed = 0.0 if self.settings.overlong == "error" else self.settings.max_cut_share
        if fit.cut > allowed * fit.texts:
            raise UserError(
                f"encoder.max_length: {fit.cut} of {fit.texts} {split} texts are longer than {limit} {self.units} (the "
                f"longest has {fit.longest}): raise it, or leave them out with task.max_text_bytes"
            )
        if fit.cut:
            logger.warning("encoder: %d of %d %s texts are cut to %d %s", fit.cut, fit.texts, split, limit, self.units)
        return fit

    def fitted(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's units, cut where the settings say so; UserError for one that is too long otherwise."""
        rows, limit = [self.ids(text) for text in texts], self.settings.max_length
        longest = max(map(len, rows))
        if longest > limit and self.settings.overlong == "error":
            raise UserError(
                f"encoder.max_length: a text has {longest} {self.units}, the encoder takes {limit}: nothing is cut; "
                "raise it, or leave the text out with task.max_text_bytes"
            )
        return [row[-limit:] if self.settings.overlong == "cut_start" else row[:limit] for row in rows]


class LatentPooling(nn.Module):
    """M learned queries that attend to an encoder's states, then an MLP, and Z normalised per vector."""

    def __init__(self, width: int, heads: int, latent: LatentSettings) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(latent.length, width) / math.sqrt(width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.to_latents = nn.Sequential(nn.Linear(width, latent.dimension), nn.LayerNorm(latent.dimension))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Z [batch, M, d_z] of states [batch, time, width]; mask [batch, time] is 0 where padded."""
        states = self.norm(states)
        queries = self.queries.expand(len(states), -1, -1)
        pooled, _ = self.attention(queries, states, states, key_padding_mask=mask == 0, need_weights=False)
        pooled = queries + pooled
        latents: Tensor = self.to_latents(pooled + self.mlp(pooled))
        return latents


class ByteEncoder(TextEncoder):
    """A pre-norm transformer over UTF-8 bytes with sinusoidal positions, and latent pooling."""

    units = "bytes"

    def __init__(self, settings: EncoderSettings, latent: LatentSettings) -> None:
        super().__init__(settings)
        width = settings.width
        self.embedding = nn.Embedding(BYTE_PADDING + 1, width)
        # Scaled by sqrt(width) below, bytes and positions then weigh the same, and neither drowns what layers add.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 4 * width, settings.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.pooling = LatentPooling(width, settings.heads, latent)

    def ids(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Z of each text, [batch, M, d_z]."""
        ids, mask = padded_ids(self.fitted(texts), BYTE_PADDING, self.embedding.weight.device)
        width = self.settings.width
        states = self.embedding(ids) * math.sqrt(width) + sinusoids(ids.shape[1], width, ids.device)
        latents: Tensor = self.pooling(self.layers(states, src_key_padding_mask=mask == 0), mask)
        return latents


class SentenceEncoder(TextEncoder):
    """A frozen sentence encoder (MiniLM), whose token states are projected and pooled."""

    def __init__(self, settings: EncoderSettings, latent: LatentSettings, path: Path) -> None:
        super().__init__(settings)
        self.model, self.tokenizer = load_sentence_encoder(path)
        positions = self.model.config.max_position_embeddings
        if settings.max_length > positions:
            raise UserError(
                f"encoder.max_length ({settings.max_length}) is above the {positions} tokens that the sentence encoder "
                "takes: lower it"
            )
        self.projection = nn.Linear(self.model.config.hidden_size, settings.width)
        self.pooling = LatentPooling(settings.width, settings.heads, latent)

    def train(self, mode: bool = True) -> Self:
        """As for any module, but that the frozen encoder keeps its dropout off."""
        super().train(mode)
        self.model.eval()
        return self

    def ids(self, text: str) -> list[int]:
        """The sentence encoder's tokens, its own special ones included."""
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Z of each text, [batch, M, d_z]."""
        ids, mask = padded_ids(self.fitted(texts), 0, self.projection.weight.device)
        with torch.no_grad():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        latents: Tensor = self.pooling(self.projection(states.to(self.projection.weight.dtype)), mask)
        return latents


class LanguageModelEncoder(TextEncoder):
    """A reader's model with a LoRA of its own: BOS, the text and M learned queries, whose final states become Z.

    The frozen weights are the reader's, not a copy; what a channel trained inside the reader is released first.
    """

    def __init__(self, settings: EncoderSettings, latent: LatentSettings, reader: Reader, seed: int) -> None:
        super().__init__(settings)
        limit = reader.context_length
        if limit is not None and settings.max_length + latent.length > limit:
            raise UserError(
                f"encoder.max_length ({settings.max_length}) and latent.length ({latent.length}) are together above "
                f"the {limit} tokens that {reader.name} takes: lower encoder.max_length"
            )
        self.tokenizer, self.bos_ids = reader.tokenizer, reader.bos_ids
        self.model: Any = add_lora(_sharing_weights(reader.release()), settings.lora, seed)
        size = reader.vocabulary_rms
        self.queries = nn.Parameter(torch.randn(latent.length, reader.hidden_size) * size)
        self.to_latents = nn.Sequential(nn.Linear(reader.hidden_size, latent.dimension), nn.LayerNorm(latent.dimension))

    def ids(self, text: str) -> list[int]:
        """BOS, where the reader has it, and the text's tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*self.bos_ids, *ids]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Z of each text, [batch, M, d_z]."""
        ids, mask = padded_ids(self.fitted(texts), 0, self.queries.device, left=True)
        embedded = self.model.get_input_embeddings()(ids)
        queries = self.queries.to(embedded.dtype).expand(len(ids), -1, -1)
        mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)
        decoder = self.model.get_base_model().get_decoder()
        states = decoder(
            inputs_embeds=torch.cat([embedded, queries], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        latents: Tensor = self.to_latents(states[:, -queries.shape[1] :].to(self.queries.dtype))
        return latents


def padded_ids(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids [batch, longest], and the mask, 0 where padded; an empty row gets one padding that is seen."""
    longest = max(1, *map(len, rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        filled = slice(longest - max(1, len(row)), longest) if left else slice(0, max(1, len(row)))
        ids[index, filled] = torch.tensor(list(row) or [padding])
        mask[index, filled] = 1
    return ids.to(device), mask.to(device)


def sinusoids(time: int, width: int, device: torch.device) -> Tensor:
    """Positions as sines and cosines, [time, width] (Vaswani et al., arXiv 1706.03762)."""
    places = torch.arange(time, device=device, dtype=torch.float32)[:, None]
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = places * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """New modules around the same parameters: an adapter put into them leaves the model itself as it is."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
