"""Scores of reconstructions: what the original model does with them, on held-out documents and without noise.

A batch of documents is read once; each variant's reconstruction then runs the chosen token alone. Stands between
`evaluate`, which decides what is scored, and the lens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.evaluation.results_files import typed
from stillhouse.runtime.seeds import derived_seed
from stillhouse.studies.consistency_lens.data import Example, pad_contexts
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.results import ITEM_COLUMNS


@dataclass(frozen=True)
class Variant:
    """One way to get reconstructions of the items: a text for the lens's encoder, or activations themselves.

    token_ids: [items, T]. reconstructions: [items, hidden] fp32; where they are None the encoder makes them.
    """

    name: str
    token_ids: Tensor | None = None
    reconstructions: Tensor | None = None


def activations_of(examples: Sequence[Example]) -> Tensor:
    """The extracted activations, [items, hidden] fp32."""
    return torch.stack([example.activation for example in examples if example.activation is not None])


@torch.no_grad()
def explanations(lens: Lens, activations: Tensor, batch_size: int, sample_seed: int | None = None) -> Tensor:
    """Texts [items, T] of activations [items, hidden]: greedy, or sampled by the seed."""
    device = lens.original.device
    texts = []
    for number, batch in enumerate(activations.split(batch_size)):
        if sample_seed is not None:
            torch.manual_seed(derived_seed(sample_seed, number))
        texts.append(lens.explain(batch.to(device), gumbel_noise=0.0 if sample_seed is None else 1.0).token_ids.cpu())
    return torch.cat(texts)


@torch.no_grad()
def reconstructions(lens: Lens, token_ids: Tensor, batch_size: int) -> Tensor:
    """What the encoder makes of texts [items, T]: [items, hidden] fp32."""
    device = lens.original.device
    return torch.cat([lens.reconstruct_tokens(batch.to(device)).cpu() for batch in token_ids.split(batch_size)])


def best_of(lens: Lens, activations: Tensor, counts: Sequence[int], batch_size: int, seed: int) -> dict[int, Tensor]:
    """For each K the best of the first K sampled texts of each activation, [items, T].

    Best is the smallest squared error of the reconstruction: known when an activation is explained.
    """
    samples, errors = [], []
    for number in range(max(counts, default=0)):
        samples.append(explanations(lens, activations, batch_size, derived_seed(seed, "best of", number)))
        errors.append((reconstructions(lens, samples[-1], batch_size) - activations).square().sum(1))
    rows = torch.arange(len(activations))
    return {k: torch.stack(samples[:k])[torch.stack(errors[:k]).argmin(0), rows] for k in counts}


@torch.no_grad()
def next_token_distributions(
    lens: Lens, examples: Sequence[Example], candidates: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities [items, vocabulary] after the chosen tokens: with the activations, and with each candidate."""
    device = lens.original.device
    input_ids, mask, positions = pad_contexts(examples)
    reading = lens.read(input_ids.to(device), mask.to(device), positions.to(device))
    true, *others = (
        lens.next_token_logits(reading, values.to(device)).log_softmax(-1)
        for values in (activations_of(examples), *candidates)
    )
    return true, others


def score(
    lens: Lens,
    examples: Sequence[Example],
    variants: Sequence[Variant],
    mean: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> pd.DataFrame:
    """One row per variant and item; see `results.ITEM_COLUMNS`. mean: [hidden], of the training activations."""
    frames = []
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        batch = examples[rows]
        true_activations = activations_of(batch)
        candidates = [
            reconstructions(lens, variant.token_ids[rows], batch_size)
            if variant.reconstructions is None and variant.token_ids is not None
            else _given(variant)[rows]
            for variant in variants
        ]
        true, others = next_token_distributions(lens, batch, candidates)
        for variant, candidate, distribution in zip(variants, candidates, others, strict=True):
            columns: dict[str, Any] = {
                "variant": variant.name,
                "item_id": [example.document_id for example in batch],
                "kl": kl_divergence(true, distribution),
                "squared_error": (candidate - true_activations).square().mean(1),
                "squared_deviation": (mean - true_activations).square().mean(1),
                "top1": true.argmax(-1) == distribution.argmax(-1),
            }
            columns = {name: c.cpu().numpy() if isinstance(c, Tensor) else c for name, c in columns.items()}
            texts = None if variant.token_ids is None else variant.token_ids[rows]
            frames.append(
                typed(pd.DataFrame(columns | text_columns(lens.original, texts, tokenizer, len(batch))), ITEM_COLUMNS)
            )
    return pd.concat(frames, ignore_index=True)


def kl_divergence(true: Tensor, other: Tensor) -> Tensor:
    """KL of log-probabilities [items, vocabulary], in nats: [items]."""
    return functional.kl_div(other, true, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def text_columns(
    model: PreTrainedModel, token_ids: Tensor | None, tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, Any]:
    """The texts, and their NLL under the original: the sum over the tokens after the first, which has no context."""
    if token_ids is None:
        return dict.fromkeys(("text", "text_nll", "text_tokens", "token_ids"), [None] * count)
    ids = token_ids.to(model.device)
    nll = torch.zeros(count)
    if ids.shape[1] > 1:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1).cpu()
    return {
        "text": tokenizer.batch_decode(token_ids),
        "text_nll": nll.numpy(),
        "text_tokens": ids.shape[1] - 1,
        "token_ids": token_ids.tolist(),
    }


def _given(variant: Variant) -> Tensor:
    if variant.reconstructions is None:
        raise ValueError(f"variant {variant.name} has neither a text nor reconstructions")
    return variant.reconstructions
