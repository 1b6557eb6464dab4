"""Adapters: from Z to one model's embedding space, at the size that the model's own embeddings have.

LayerNorm, optional FiLM (arXiv 1709.07871) by the mean of the example's vectors, an MLP beside a linear skip, a
calibration of the whole example's root mean square, and a learned scale that begins at 1. Z is all that reaches an
adapter: no property of the gold answer does. `mask`, [batch, M], is 0 for vectors that latent dropout takes away: what
is measured over an example's vectors leaves them out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.studies.latentwire.prompt import KeysValues, LayerShape
from stillhouse.studies.latentwire.run_settings import AdapterSettings

_SMALLEST_RMS = 1e-8


class Adapter(nn.Module):
    """One model's adapter.

    dimension: d_z. hidden_size: width of the model's embeddings. rms: root mean square that calibrations other than
    `none` give each example's prefix. layers: the shape of a deep prefix, None where there is none.
    """

    target_rms: Tensor

    def __init__(
        self, settings: AdapterSettings, dimension: int, hidden_size: int, rms: float, layers: LayerShape | None = None
    ) -> None:
        super().__init__()
        self.settings, self.layers = settings, layers
        width = max(1, round(settings.hidden_multiple * dimension))
        self.norm = nn.LayerNorm(dimension)
        self.film = nn.Linear(dimension, 2 * dimension) if settings.film else None
        self.mlp = nn.Sequential(
            nn.Linear(dimension, width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(width, hidden_size)
        )
        self.skip = nn.Linear(dimension, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.deep = nn.Linear(dimension, layers.numbers) if layers else None
        self.register_buffer("target_rms", torch.tensor(rms, dtype=torch.float32))
        if self.film is not None:
            # FiLM begins as the identity.
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        if self.deep is not None:
            nn.init.normal_(self.deep.weight, std=0.02)
            nn.init.zeros_(self.deep.bias)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prefix before calibration, [batch, M, hidden], of latents [batch, M, d_z]."""
        normed = self._modulated(latents, mask)
        prefix: Tensor = self.skip(normed) + self.mlp(normed)
        return prefix

    def calibrate(self, prefix: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prefix [batch, M, hidden] at the calibrated size, each example by itself, times the learned scale."""
        if self.settings.calibration != "none":
            prefix = prefix * (self.target_rms / root_mean_square(prefix, mask))[:, None, None]
        return prefix * self.scale

    def layer_states(self, latents: Tensor, mask: Tensor | None = None) -> KeysValues:
        """Keys and values of a deep prefix, empty where there is none."""
        if self.deep is None or self.layers is None:
            return ()
        return self.layers.split(self.deep(self._modulated(latents, mask)))

    def _modulated(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        normed: Tensor = self.norm(latents)
        if self.film is not None:
            gain, shift = self.film(_mean_over_kept(normed, mask)[:, None]).chunk(2, dim=-1)
            normed = normed * (1 + gain) + shift
        return normed


def root_mean_square(prefix: Tensor, mask: Tensor | None = None) -> Tensor:
    """Per example, [batch], over vectors and features of [batch, M, hidden]."""
    return _mean_over_kept(prefix.float().square(), mask).mean(dim=1).sqrt().clamp(min=_SMALLEST_RMS)


def _mean_over_kept(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [batch, features] over the vectors [batch, M, features] that are there."""
    if mask is None:
        return vectors.mean(dim=1)
    kept = mask[..., None].to(vectors.dtype)
    return (vectors * kept).sum(dim=1) / kept.sum(dim=1)
