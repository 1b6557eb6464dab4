"""A tiny lens, and the same computations in their naive forms: whole sequences, no cache, nothing fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.models.activations import residual_stream, swapped
from stillhouse.studies.consistency_lens.data import ActivationBatch
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.parts import embedding_matrix
from stillhouse.studies.consistency_lens.run_settings import LensSettings
from stillhouse.studies.consistency_lens.sampling import gumbel_noise

SETTINGS: dict[str, Any] = {
    "layer": 1,
    "text_length": 4,
    "decoder": {"prompt_text": "The word <embed> means:"},
    "encoder": {"prompt_text": "It says <text> here", "output_layer": 1},
}


def lens_settings(**changes: Any) -> LensSettings:
    return LensSettings.model_validate(SETTINGS | changes)


def tiny_lens(model_dir: Path, **changes: Any) -> Lens:
    return Lens.build(model_dir, lens_settings(**changes), "fp32", "cpu")


def perturbed(lens: Lens) -> Lens:
    """A lens starts as the identity; make its projections something else."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (lens.decoder.projection.weight, lens.encoder.projection.weight):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lens


def naive_explanation(lens: Lens, activations: Tensor, temperature: float, noisy: bool) -> tuple[Tensor, ...]:
    """Token ids, embeddings and logits: after each token the whole sequence is read again."""
    decoder, matrix = lens.decoder, embedding_matrix(lens.decoder.base)
    batch, place = len(activations), decoder.place
    embedded = functional.linear(activations, decoder.projection.weight, decoder.projection.bias)[:, None]
    left = decoder.prompt[:place].expand(batch, -1, -1)
    right = decoder.prompt[place:].expand(batch, -1, -1)
    read = torch.cat([left, embedded, right], dim=1)
    ids, text, logits = [], [], []
    for _ in range(lens.settings.text_length):
        step = decoder.base(inputs_embeds=read, use_cache=False).logits[:, -1]
        noise = gumbel_noise(step) if noisy else torch.zeros_like(step)
        soft = ((step + noise) / temperature).softmax(-1)
        hard = functional.one_hot(soft.argmax(-1), soft.shape[1]).float()
        token = hard - soft.detach() + soft
        read = torch.cat([read, (token @ matrix)[:, None]], dim=1)
        text.append(token @ embedding_matrix(lens.encoder.base))
        ids.append(hard.argmax(-1))
        logits.append(step)
    return torch.stack(ids, 1), torch.stack(text, 1), torch.stack(logits, 1)


def naive_reconstruction(lens: Lens, embeddings: Tensor) -> Tensor:
    encoder, batch = lens.encoder, len(embeddings)
    left, right = (
        part.expand(batch, -1, -1)
        for part in encoder.prompt.split([encoder.place, len(encoder.prompt) - encoder.place])
    )
    hidden = residual_stream(encoder.base, encoder.layer, inputs_embeds=torch.cat([left, embeddings, right], 1))
    return functional.linear(hidden[:, -1], encoder.projection.weight, encoder.projection.bias)


def naive_original_logits(lens: Lens, ids: Tensor, mask: Tensor, positions: Tensor, activations: Tensor) -> Tensor:
    """The whole document in one pass, with the hook on its full length."""
    with swapped(lens.original, lens.settings.layer, positions, activations):
        logits = lens.original(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[torch.arange(len(ids)), positions]


def documents(batch: int = 3, tokens: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and positions of documents of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(3, tokens, (batch,), generator=generator)
    ids = torch.randint(3, 384, (batch, int(positions.max()) + 1), generator=generator)
    mask = (torch.arange(ids.shape[1]) <= positions[:, None]).long()
    return ids * mask, mask, positions


def lens_batch(lens: Lens, batch: int = 3, cached: bool = True) -> ActivationBatch:
    ours, others = documents(batch, seed=1), documents(batch, seed=2)
    return ActivationBatch(
        *ours, lens.activations_of(*ours) if cached else None, *others, lens.activations_of(*others) if cached else None
    )
