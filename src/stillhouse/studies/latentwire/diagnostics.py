"""A look at a channel while it trains: sizes, directions and collapse of Z and of the prefixes, on real texts.

`train` looks every few steps; each look is a row of `diagnostics.jsonl`. It draws no random number and leaves the
channel as it was, so training is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.studies.latentwire.channel import Channel, Latents
from stillhouse.studies.latentwire.curves import DiagnosticsRow, ReaderDiagnostics
from stillhouse.studies.latentwire.reader import Reader

COMPONENTS = 16
TEXTS = 32
_BATCH = 16


class IncrementalPca:
    """Leading principal components of vectors that come in batches (Ross et al. 2008, "Incremental learning").

    Memory is that of the kept components and one batch. Exact while no component was dropped; the total variance is
    exact always.
    """

    mean: Tensor
    scatter: Tensor
    singular_values: Tensor
    directions: Tensor

    def __init__(self, components: int = COMPONENTS) -> None:
        self.components, self.count = components, 0

    def update(self, vectors: Tensor) -> None:
        """Take in [n, dimension]."""
        rows = vectors.detach().double().cpu()
        batch_mean, count = rows.mean(dim=0), len(rows)
        centred = rows - batch_mean
        if self.count == 0:
            self.mean, self.scatter, stacked = batch_mean, centred.square().sum(), centred
        else:
            # The means' distance is one more direction of variance, weighted as if both parts were seen at once.
            shift = (self.mean - batch_mean) * (self.count * count / (self.count + count)) ** 0.5
            self.scatter = self.scatter + centred.square().sum() + shift.square().sum()
            self.mean = (self.count * self.mean + count * batch_mean) / (self.count + count)
            stacked = torch.cat([self.singular_values[:, None] * self.directions, centred, shift[None]])
        _, values, directions = torch.linalg.svd(stacked, full_matrices=False)
        self.singular_values, self.directions = values[: self.components], directions[: self.components]
        self.count += count

    @property
    def explained(self) -> tuple[float, ...]:
        """Cumulative share of the variance by number of components; ones where there is no variance at all."""
        shares = self.singular_values.square().cumsum(0) / self.scatter.clamp(min=torch.finfo(torch.double).tiny)
        return tuple(round(share, 6) for share in (shares if self.scatter > 0 else torch.ones_like(shares)).tolist())

    def share_inside(self, vectors: Tensor) -> float:
        """The share of the variance of `vectors`, [n, dimension], that lies in the space of the components."""
        centred = vectors.detach().double().cpu() - vectors.detach().double().cpu().mean(dim=0)
        total = centred.square().sum()
        return float((centred @ self.directions.T).square().sum() / total) if total > 0 else 1.0


def between_share(vectors: Tensor) -> float:
    """The share of the variance of [texts, positions, dimension] that lies between texts at the same position.

    Near 0: every text gives the same vectors, and nothing about it is sent.
    """
    values = vectors.detach().double()
    within = values - values.mean(dim=0, keepdim=True)
    total = values - values.mean(dim=(0, 1), keepdim=True)
    return float(within.square().sum() / total.square().sum()) if total.square().sum() > 0 else 0.0


class Diagnostics:
    """Looks at a channel through the same texts each time; what is measured of their embeddings is measured once."""

    def __init__(self, texts: Sequence[str]) -> None:
        """texts: the first `TEXTS` of them are looked at; ValueError where there are none."""
        if not texts:
            raise ValueError("diagnostics need at least one text")
        self.texts = list(texts[:TEXTS])
        self._embeddings: dict[str, tuple[IncrementalPca, float]] = {}

    @torch.no_grad()
    def __call__(self, channel: Channel, step: int) -> DiagnosticsRow:
        """The row of this moment; the channel's mode is as before after it."""
        training = channel.training
        row = self._row(channel.eval(), step)
        channel.train(training)
        return row

    def _row(self, channel: Channel, step: int) -> DiagnosticsRow:
        batches = [self.texts[start : start + _BATCH] for start in range(0, len(self.texts), _BATCH)]
        latents = [channel.encode(batch) for batch in batches]
        messages = torch.cat([one.message() for one in latents]).float()
        pca = IncrementalPca()
        for batch in messages.split(_BATCH):
            pca.update(batch.flatten(0, 1))
        return DiagnosticsRow(
            step=step,
            texts=len(self.texts),
            latent_mean=messages.mean().item(),
            latent_std=messages.std().item(),
            latent_rms=messages.square().mean().sqrt().item(),
            latent_abs_max=messages.abs().max().item(),
            latent_between_share=between_share(messages),
            latent_explained=pca.explained,
            readers={name: self._reader(channel, channel.reader(name), latents) for name in channel.readers},
        )

    def _reader(self, channel: Channel, reader: Reader, latents: Sequence[Latents]) -> ReaderDiagnostics:
        prefixes, first, pca = [], [], IncrementalPca()
        for batch in latents:
            prefix = channel.prefix(reader.name, batch)
            first.append(reader.first_logits(reader.prompt_embeddings(prefix)).argmax(dim=-1))
            prefixes.append(prefix.embeddings.float())
            pca.update(prefixes[-1].flatten(0, 1))
        counts = torch.cat(first).unique(return_counts=True)[1]
        whole = torch.cat(prefixes)
        embeddings, rms = self._embeddings_of(reader)
        return ReaderDiagnostics(
            prefix_rms=whole.square().mean().sqrt().item(),
            embedding_rms=rms,
            first_token_share=counts.max().item() / len(self.texts),
            distinct_first_tokens=len(counts),
            between_share=between_share(whole),
            prefix_explained=pca.explained,
            embedding_explained=embeddings.explained,
            inside_share=embeddings.share_inside(whole.flatten(0, 1)),
        )

    def _embeddings_of(self, reader: Reader) -> tuple[IncrementalPca, float]:
        """Components and RMS of the embeddings of the texts' own tokens, measured once."""
        if reader.name not in self._embeddings:
            pca = IncrementalPca()
            tokens = [reader.text_ids(text) for text in self.texts]
            for ids in tokens:
                pca.update(reader.embed(ids).float())
            self._embeddings[reader.name] = pca, reader.embedding_rms([token for ids in tokens for token in ids])
        return self._embeddings[reader.name]
