"""Generators: from the embeddings of a handful of prompts to the tensors of an adapter.

A decoder gives standardised weight tokens as deviations from a start: the mean of the training adapters, or zero. With
guidance the generator first predicts the delta activation that the prompts ask for, and decodes from both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.config.base import StrictModel
from stillhouse.models.loading import check_safetensors, frozen
from stillhouse.models.lora_tensors import AdapterTensors, LoraLayout
from stillhouse.models.precision import default_device
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_json
from stillhouse.studies.lora_generation.decoders import CompactDecoder, HyperConvolutionDecoder
from stillhouse.studies.lora_generation.generator_settings import GeneratorSettings, TokenSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from stillhouse.studies.lora_generation.tokens import WeightTokeniser

PLAN_FILE, WEIGHTS = "generator.json", "model.safetensors"


class GeneratorPlan(StrictModel):
    """All that a generator is built from; it stands beside the checkpoints."""

    generator: GeneratorSettings
    tokens: TokenSettings
    layout: LoraLayout
    base_model: str
    text_key: str
    vectors: int
    width: int
    guide: int | None  # size of the predicted delta activation


@dataclass(frozen=True)
class Generated:
    """A batch of adapters, and the predicted delta activations [batch, hidden] where the generator is guided."""

    adapter: AdapterTensors
    delta: Tensor | None = None


class Generator(nn.Module):
    """Prompt embeddings to adapters of one layout; `fit` before training, `load_generator` afterwards."""

    condition_mean: Tensor
    condition_deviation: Tensor

    def __init__(self, plan: GeneratorPlan) -> None:
        super().__init__()
        self.plan = plan
        self.tokeniser = WeightTokeniser(plan.layout, plan.tokens)
        self.guide = Guide(plan.width, plan.generator.width, plan.guide) if plan.guide else None
        self.decoder: nn.Module
        if plan.generator.kind == "compact":
            self.decoder = CompactDecoder(plan.generator, self.tokeniser, plan.width)
        else:
            shape = (plan.generator.prompts, plan.vectors, plan.width)
            self.decoder = HyperConvolutionDecoder(plan.generator, self.tokeniser, shape)
        self.register_buffer("condition_mean", torch.zeros(plan.width))
        self.register_buffer("condition_deviation", torch.ones(plan.width))

    def fit(self, adapters: Iterable[AdapterTensors], deltas: Tensor, conditions: Tensor) -> None:
        """Take means and sizes from the training adapters, their deltas [adapters, hidden] and their conditions.

        conditions: [adapters, prompts, vectors, width]. What all of their prompts have in common says nothing.
        """
        self.tokeniser.fit(adapters)
        self.condition_mean.copy_(conditions.mean((0, 1, 2)))
        self.condition_deviation.copy_(conditions.std((0, 1, 2), correction=0).clamp(min=1e-6))
        if self.guide:
            self.guide.size.copy_(deltas.square().mean().sqrt())

    def forward(self, conditions: Tensor) -> Generated:
        """A batch of adapters for conditions [batch, prompts, vectors, width]."""
        delta = None
        conditions = (conditions - self.condition_mean) / self.condition_deviation
        if self.guide:
            delta, conditions = self.guide(conditions)
        tokens: Tensor = self.decoder(conditions)
        if self.plan.generator.start == "mean":
            tokens = tokens + self.tokeniser.average
        return Generated(self.tokeniser.decode(tokens), delta)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], encoder: PromptEncoder) -> AdapterTensors:
        """One adapter, on the CPU, for the first prompts, as many as the generator reads; they are embedded anew.

        Raises `UserError` for too few prompts and for another encoder than it was trained with.
        """
        wanted = self.plan.generator.prompts
        if len(prompts) < wanted:
            raise UserError(f"prompts: {len(prompts)} are given, the generator reads {wanted}: give more")
        if encoder.key != self.plan.text_key:
            raise UserError(
                f"{encoder.path}: is not the text encoder that the generator was trained with: use that one"
            )
        conditions = encoder.embed_anew(prompts[:wanted]).to(self.condition_mean.device)
        adapter: AdapterTensors = self(conditions[None]).adapter[0]
        return adapter.to(torch.device("cpu"))


class Guide(nn.Module):
    """Predicts the delta activation from the conditions, and adds what it says to each of them."""

    size: Tensor

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, hidden))
        self.tell = nn.Linear(hidden, width)
        self.register_buffer("size", torch.ones(()))

    def forward(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted delta activations [batch, hidden], and the conditions with them, of the shape they had."""
        predicted = self.predict(conditions.mean((1, 2)))
        return self.size * predicted, conditions + self.tell(predicted)[:, None, None]


def write_plan(directory: Path, plan: GeneratorPlan) -> None:
    """Leave the plan in the directory of the checkpoints."""
    write_json(directory / PLAN_FILE, plan.model_dump(mode="json"))


def load_generator(checkpoint: Path) -> Generator:
    """A generator from `checkpoint-<step>/`, in evaluation mode, on the GPU where there is one.

    Raises `UserError` for a directory that holds none, or is damaged.
    """
    path = checkpoint.parent / PLAN_FILE
    weights = checkpoint / WEIGHTS
    check_safetensors(weights)
    try:
        generator = Generator(GeneratorPlan.model_validate(read_json(path)))
        generator.load_state_dict(load_file(weights))
    except (ValidationError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{weights}: does not fit {path} ({reason}): train the generator again") from None
    return frozen(generator).to(default_device())
