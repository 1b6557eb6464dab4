"""Answers sampled in training: batched, with a KV cache, and a function of (seed, step, example) alone.

Each position of an example's answer has a uniform number of its own, drawn in advance; the token is where the
distribution's cumulative sum passes it. So a sample does not depend on the batch that it is drawn in (beyond rounding),
on the number of processes or on the device, and a resumed run draws the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from stillhouse.data.packing import Sequence
from stillhouse.models.loading import evaluation_mode
from stillhouse.runtime.seeds import generator
from stillhouse.studies.quantized_distillation.run_settings import SamplingSettings


def with_sampled_answers(
    model: nn.Module,
    sequences: Items[Sequence],
    settings: SamplingSettings,
    stop_ids: Items[int],
    seed: int,
    step: int,
) -> list[Sequence]:
    """The same prompts with answers that `model` samples, dropout off; a token of `stop_ids` ends one, its last."""
    uniforms = torch.stack(
        [
            torch.rand(
                settings.max_new_tokens,
                generator=generator(seed, "answer", step, sequence.example_id),
                dtype=torch.float64,
            )
            for sequence in sequences
        ]
    )
    prompts = [sequence.prompt_ids for sequence in sequences]
    with evaluation_mode(model), torch.no_grad():
        answers = sample(model, prompts, uniforms, settings, stop_ids)
    return [
        Sequence([*prompt, *answer], len(prompt), sequence.example_id)
        for prompt, answer, sequence in zip(prompts, answers, sequences, strict=True)
    ]


def sample(
    model: nn.Module, prompts: Items[list[int]], uniforms: Tensor, settings: SamplingSettings, stop_ids: Items[int]
) -> list[list[int]]:
    """One answer to each prompt; uniforms: [prompts, max_new_tokens] in [0, 1).

    Finished rows leave the batch, so the last long answers do not pay for the others.
    """
    device = next(model.parameters()).device
    tokens, mask = (tensor.to(device) for tensor in _left_padded(prompts))
    uniforms, stops = uniforms.to(device), torch.tensor(list(stop_ids), device=device)
    cache: Any = DynamicCache(config=model.config)
    rows = torch.arange(len(prompts), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    for place in range(settings.max_new_tokens):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if place < settings.min_new_tokens:
            logits[:, stops] = -torch.inf
        drawn = draw(logits / settings.temperature, uniforms[rows, place])
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            answers[row].append(token)
        going = ~torch.isin(drawn, stops)
        if not going.any():
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, drawn, mask, position_ids = rows[going], drawn[going], mask[going], position_ids[going]
        tokens = drawn[:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return answers


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token id per row of logits [rows, vocabulary]: where the cumulative distribution passes `uniforms` [rows]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = uniforms[:, None] * cumulative[:, -1:]  # rounding may leave the last sum off 1
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _left_padded(prompts: Items[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [prompts, longest], all prompts ending in the last column."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
