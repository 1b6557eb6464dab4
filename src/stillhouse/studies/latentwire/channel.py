"""The trained module: an encoder from text to Z, and one adapter per reader from Z to its embedding space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.models.loading import check_safetensors
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import derived_seed
from stillhouse.studies.latentwire.adapters import Adapter
from stillhouse.studies.latentwire.encoders import ByteEncoder, LanguageModelEncoder, SentenceEncoder, TextEncoder
from stillhouse.studies.latentwire.gist import GistDecoder
from stillhouse.studies.latentwire.prompt import Prefix
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.training.checkpoints import trained_tensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Latents:
    """Z of a batch: what all readers share, and each reader's own.

    shared: [batch, M_shared, d_z]. private: per model [batch, M_private, d_z], of length 0 where there are none.
    """

    shared: Tensor
    private: Mapping[str, Tensor]

    def message(self) -> Tensor:
        """What goes over the wire: [batch, M, d_z], shared vectors first, then each model's in the pair's order."""
        return torch.cat([self.shared, *self.private.values()], dim=1)

    def of_model(self, name: str) -> Tensor:
        """What one reader gets: [batch, M_shared + M_private, d_z]."""
        return torch.cat([self.shared, self.private[name]], dim=1)


class Channel(nn.Module):
    """Encoder and adapters; its readers are part of it, frozen. `Channel.build` and `Channel.load` make one.

    Readers may be shared by several channels, but serve the one that was built or loaded last: a channel that trains
    parts of them (LoRA, prefix tuning) puts these into them.
    """

    def __init__(
        self, run: RunSettings, readers: Mapping[str, Reader], encoder: TextEncoder, rms: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.run, self.encoder = run, encoder
        self.readers = nn.ModuleDict(readers)
        self.adapters = nn.ModuleDict(
            {
                name: Adapter(
                    run.adapter,
                    run.latent.dimension,
                    reader.hidden_size,
                    rms[name],
                    reader.layer_shape if run.reader.deep_prefix else None,
                )
                for name, reader in readers.items()
            }
        )
        self.gist = GistDecoder(run.latent.dimension, run.losses.gist_bytes) if run.losses.gist else None

    @classmethod
    def build(
        cls,
        run: RunSettings,
        readers: Mapping[str, Reader],
        seed: int,
        encoder_path: Path | None = None,
        train_texts: Sequence[str] = (),
    ) -> Self:
        """A new channel on its readers' device, its weights drawn by `seed`.

        encoder_path: the model directory of encoder kind sentence. train_texts: what train_stats measures.
        """
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(seed, "channel"))
            encoder = _encoder(run, readers, seed, encoder_path)
            for reader in readers.values():
                reader.adapt(run.reader, seed)
            rms = {name: _target_rms(run, reader, train_texts) for name, reader in readers.items()}
            channel = cls(run, readers, encoder, rms)
        return channel.to(next(iter(readers.values())).device)

    @classmethod
    def load(
        cls, checkpoint: Path, run: RunSettings, readers: Mapping[str, Reader], encoder_path: Path | None = None
    ) -> Self:
        """A trained channel, in evaluation mode, from `checkpoint-<step>/`.

        Raises UserError for a checkpoint that is damaged or of a channel with other settings.
        """
        path = checkpoint / WEIGHTS
        check_safetensors(path)
        tensors = load_file(path)
        # What train_stats measured is among the tensors: any text stands in for the training texts.
        channel = cls.build(run, readers, 0, encoder_path, train_texts=("text",))
        expected = trained_tensors(channel)
        if {name: value.shape for name, value in tensors.items()} != {n: v.shape for n, v in expected.items()}:
            raise UserError(f"{path}: is of a channel with other settings or readers: train it again")
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(tensors[name])
        return channel.requires_grad_(False).eval()

    def encode(self, texts: Sequence[str]) -> Latents:
        """Z of each text. Raises UserError for a text that the encoder cannot take whole."""
        return self.latents(self.encoder(texts))

    def latents(self, message: Tensor) -> Latents:
        """The other side of the wire: from [batch, M, d_z]; UserError for another shape."""
        latent, names = self.run.latent, list(self.readers)
        if message.ndim != 3 or message.shape[1:] != (latent.length, latent.dimension):
            raise UserError(
                f"latents of shape {list(message.shape[1:])}: this channel's are [{latent.length}, {latent.dimension}]"
            )
        sizes = [latent.shared(len(names))] + [latent.private] * len(names)
        shared, *private = message.split(sizes, dim=1)
        return Latents(shared, dict(zip(names, private, strict=True)))

    def prefix(self, model_name: str, latents: Latents, mask: Tensor | None = None) -> Prefix:
        """What `model_name` reads in the text's place; `.embeddings` is [batch, M, hidden].

        mask: [batch, M], 0 for vectors that the reader shall not see.
        """
        return self.adapted(model_name, latents, mask)[0]

    def adapted(self, model_name: str, latents: Latents, mask: Tensor | None = None) -> tuple[Prefix, Tensor]:
        """`prefix`, and the same embeddings before calibration."""
        adapter, own = self.adapters[model_name], latents.of_model(model_name)
        assert isinstance(adapter, Adapter)
        raw = adapter(own, mask)
        return Prefix(adapter.calibrate(raw, mask), mask, adapter.layer_states(own, mask)), raw

    def reader(self, model_name: str) -> Reader:
        """One of the readers."""
        reader = self.readers[model_name]
        assert isinstance(reader, Reader)
        return reader

    # What the training loop asks of a model that shall recompute activations.

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any]) -> None:
        """Recompute activations in the readers, and in an encoder that is a language model."""
        for name in self.readers:
            self.reader(name).recompute_activations()
        if isinstance(self.encoder, LanguageModelEncoder):
            self.encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: prefixes and queries are inputs that require gradients."""


def _encoder(run: RunSettings, readers: Mapping[str, Reader], seed: int, path: Path | None) -> TextEncoder:
    settings = run.encoder
    if settings.kind == "bytes":
        return ByteEncoder(settings, run.latent)
    if settings.kind == "language_model":
        return LanguageModelEncoder(settings, run.latent, readers[settings.model or next(iter(readers))], seed)
    if path is None:
        raise UserError(f"encoder.kind sentence: needs the model directory of '{settings.model}': give encoder=PATH")
    return SentenceEncoder(settings, run.latent, path)


def _target_rms(run: RunSettings, reader: Reader, train_texts: Sequence[str]) -> float:
    """The size of a prefix that the calibration asks for; what `none` is compared with by the RMS penalty."""
    if run.adapter.calibration == "fixed":
        return run.adapter.rms
    if run.adapter.calibration == "train_stats":
        return reader.embedding_rms([token for text in train_texts for token in reader.text_ids(text)])
    return reader.vocabulary_rms
