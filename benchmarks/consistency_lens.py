"""The lens's decoder with its differentiable KV cache, and without: forward and backward pass of T tokens.

No library offers a cache through which gradients flow, so the naive form is the only other one: after each token the
whole sequence is read again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, loss_and_gradients, model_directory
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.run_settings import LensSettings
from tests.consistency_lens.lenses import naive_explanation


def lens_and_activations(folder: Path, scale: Scale) -> tuple[Lens, Tensor]:
    """A lens of the scale's model, and a batch of activations to explain."""
    settings = LensSettings(layer=1, text_length=scale.text_length)
    lens = Lens.build(model_directory(folder, scale), settings, scale.precision)
    drawing = torch.Generator().manual_seed(0)
    prompt = lens.decoder.prompt
    return lens, torch.randn(scale.batch, scale.width, generator=drawing).to(prompt.device)


def outcome(lens: Lens, embeddings: Tensor) -> Outcome:
    """Something of every embedding, and its gradients."""
    return {"embeddings": embeddings.detach(), **loss_and_gradients(lens, embeddings.square().sum())}


def uncached(folder: Path, scale: Scale) -> Work:
    """The reference form of the tests."""
    lens, activations = lens_and_activations(folder, scale)

    def work() -> Outcome:
        torch.manual_seed(0)  # the same Gumbel noise for every form
        return outcome(lens, naive_explanation(lens, activations, 1.0, True)[1])

    return work


def cached(folder: Path, scale: Scale) -> Work:
    """Ours."""
    lens, activations = lens_and_activations(folder, scale)

    def work() -> Outcome:
        torch.manual_seed(0)
        return outcome(lens, lens.explain(activations).embeddings)

    return work


def floor(folder: Path, scale: Scale) -> Floor:
    """The prompt before the activation once for all, then each text alone, the last token only written, forward and
    backward; the vocabulary three times a token: the lm_head in both directions, and the gradient of the soft token's
    embedding, whose value is a look-up.
    """
    lens, _ = lens_and_activations(folder, scale)
    shared, own = lens.decoder.place, len(lens.decoder.prompt) - lens.decoder.place + scale.text_length
    rows = scale.batch * scale.text_length
    pairs = shared**2 / 2 + scale.batch * (own * shared + own**2 / 2)
    layers = scale.operations(shared + scale.batch * own, pairs, 0)
    return Floor(2 * layers + scale.operations(0, 0, 3 * rows), 2 * scale.text_length * scale.weight_bytes, rows)


def decoder(length: int, at_least: float | None) -> Benchmark:
    """The benchmark of texts of so many tokens."""
    return Benchmark(
        name=f"lens_decoder_{length}",
        what=f"lens decoder, T = {length}",
        forms=(Form("no cache", "naive", uncached), Form("differentiable cache", "ours", cached)),
        aims=() if at_least is None else (Aim("no cache", "time", at_least),),
        floor=floor,
        floor_formula="2 x forward(the prompt's start + batch x (its end + T) tokens) + 3 vocabulary products a token; "
        "the weights are read once a token in each direction",
        remains="One token of each text at a time: small products, T passes through every layer, one after another.",
        change=lambda scale: replace(scale, text_length=length),
    )


DECODERS = (decoder(10, None), decoder(32, 3))
