"""Prompts as the generator sees them: embeddings of a frozen sentence encoder, kept on disk.

`states: sentence` gives one mean-pooled vector per prompt, `tokens` the states of its first `length` tokens and zeros
behind its end. Padding never reaches a vector, so that embeddings depend on the encoder and the prompt alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.precision import default_device
from stillhouse.models.sentence_encoder import load_sentence_encoder, mean_pooled
from stillhouse.runtime.digests import digest
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_bytes, read_json, verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.studies.lora_generation.generator_settings import TextSettings


class PromptEncoder:
    """The frozen encoder with its settings; it is loaded when a prompt is not found in `cache`.

    Raises `UserError` for a directory that is missing or damaged.
    """

    def __init__(self, path: Path, settings: TextSettings, cache: Path) -> None:
        self.path, self.settings = path, settings
        determined = settings.model_dump(mode="json", exclude={"encoder", "batch_size"})
        self.key = digest({"encoder": verify_manifest(path)["files"], "settings": determined})
        self.cache = cache / self.key[:16]

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        return int(read_json(self.path / "config.json")["hidden_size"])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Conditions [prompts, vectors, width] fp32 on the CPU, from `cache` where it has them; see `embed_anew`."""
        file = self.cache / f"{digest(list(prompts))}.npy"
        if not file.is_file():
            content = io.BytesIO()
            numpy.save(content, self.embed_anew(prompts).numpy())
            atomic_write_bytes(file, content.getvalue())
        return torch.from_numpy(numpy.load(file, allow_pickle=False))

    def embed_anew(self, prompts: Sequence[str]) -> Tensor:
        """The same without `cache`: what new prompts cost. They are cut at the encoder's limit, and counted.

        Raises `UserError` where there is no prompt.
        """
        if not prompts:
            raise UserError("prompts: there are none to read: give at least one")
        size = self.settings.batch_size
        return torch.cat([self._embed(prompts[start : start + size]) for start in range(0, len(prompts), size)])

    @cached_property
    def _encoder(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_sentence_encoder(self.path)
        return model.to(default_device()), tokenizer

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        model, tokenizer = self._encoder
        limit = int(model.config.max_position_embeddings)
        if self.settings.states == "tokens":
            limit = min(limit, self.settings.length)
        lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
        if cut := sum(length > limit for length in lengths):
            logger.warning(
                "text: %d of %d prompts are longer than %d tokens: their ends are cut", cut, len(prompts), limit
            )
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = {name: tensor.to(model.device) for name, tensor in tokens.items()}
        mask = inputs["attention_mask"]
        states = model(**inputs).last_hidden_state
        if self.settings.states == "sentence":
            return mean_pooled(states, mask)[:, None].cpu()
        return pad(states * mask[..., None], (0, 0, 0, self.settings.length - states.shape[1])).cpu()
