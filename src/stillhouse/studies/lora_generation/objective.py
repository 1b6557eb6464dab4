"""The loss of a generator: distances of weights, of behaviour, or of both, between generated and teacher adapters.

Each distance is divided by what it is, on the mean of the training adapters, for no adapter at all: it is about 1 for
a generator that gives nothing, and the weights of terms mean the same for any model, rank and probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from stillhouse.models.lora_tensors import AdapterTensors, squared_distance, squared_norm
from stillhouse.runtime.seeds import generator as random_generator
from stillhouse.studies.lora_generation.deltas import Behaviour
from stillhouse.studies.lora_generation.examples import AdapterExamples, GeneratorBatch
from stillhouse.studies.lora_generation.generator_settings import LossSettings
from stillhouse.studies.lora_generation.generators import Generated, Generator
from stillhouse.studies.lora_generation.tokens import masked_mean_square
from stillhouse.training.objective import LossTerms


@dataclass(frozen=True)
class Sizes:
    """Mean squared size of the training adapters: ||dW||^2 and ||delta||^2."""

    weight: float
    delta: float

    @classmethod
    def of(cls, examples: AdapterExamples) -> Sizes:
        """The sizes over all examples."""
        weights = [float(squared_norm(adapter)) for adapter in examples.adapters()]
        return cls(sum(weights) / len(weights), float(examples.deltas.square().sum(1).mean()))


class GeneratorObjective:
    """The loss terms of a batch of adapters; which prompts are read is drawn anew for each adapter and update."""

    def __init__(self, losses: LossSettings, behaviour: Behaviour, sizes: Sizes, prompts: int, seed: int) -> None:
        self.losses, self.behaviour, self.sizes = losses, behaviour, sizes
        self.prompts, self.seed = prompts, seed

    def __call__(self, model: nn.Module, micro_batch: GeneratorBatch, step: int) -> LossTerms:
        """Sums over the adapters of a micro-batch in update number `step`."""
        chosen = torch.stack([self._draw(len(own), step, index) for index, own in _examples(micro_batch)])
        places = chosen.to(micro_batch.conditions.device)[..., None, None]
        conditions = micro_batch.conditions.take_along_dim(places, dim=1)
        return self._terms(model, conditions, micro_batch, with_delta=self.losses.delta > 0)

    def validation(self, model: nn.Module, micro_batch: GeneratorBatch) -> LossTerms:
        """The same with the first prompts of each adapter, and with every distance whatever its weight."""
        with torch.no_grad():
            return self._terms(model, micro_batch.conditions[:, : self.prompts], micro_batch, with_delta=True)

    def _draw(self, available: int, step: int, index: int) -> Tensor:
        """Places of the prompts that are read; the same whatever micro-batch or process the adapter is in."""
        draw = random_generator(self.seed, "prompts", step, index)
        return torch.randperm(available, generator=draw)[: self.prompts]

    def _terms(self, model: nn.Module, conditions: Tensor, batch: GeneratorBatch, with_delta: bool) -> LossTerms:
        assert isinstance(model, Generator)
        generated: Generated = model(conditions)
        weighted, terms = self._weight_terms(model, generated.adapter, batch)
        if with_delta:
            own = self.behaviour.delta(generated.adapter)
            loss, named = self._delta_terms(own, batch.deltas)
            weighted, terms = weighted + self.losses.delta * loss, terms | named
        if generated.delta is not None:
            guide = (generated.delta.float() - batch.deltas).square().sum(1) / self.sizes.delta
            weighted, terms = weighted + self.losses.guide * guide, terms | {"guide": guide}
        sums = {name: values.detach().sum() for name, values in terms.items()}
        return LossTerms(weighted.sum(), len(batch.indices), sums)

    def _weight_terms(
        self, model: Generator, adapter: AdapterTensors, batch: GeneratorBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss [batch] on weights, and both distances by name."""
        delta_w = (squared_distance(adapter, batch.adapters) / self.sizes.weight).float()
        encode = model.tokeniser.encode
        matrices = masked_mean_square(encode(adapter) - encode(batch.adapters))
        chosen = delta_w if self.losses.weight_kind == "delta_w" else matrices
        return self.losses.weight * chosen, {"delta_w": delta_w, "matrices": matrices}

    def _delta_terms(self, own: Tensor, teachers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [batch] on delta activations, and its parts by name."""
        error = (own - teachers).square().sum(1) / self.sizes.delta
        cosine = 1 - cosine_similarity(own, teachers)
        norm = (own.norm(dim=1).clamp(min=1e-12) / teachers.norm(dim=1)).log().square()
        loss = error if self.losses.delta_kind == "mse" else cosine + self.losses.norm * norm
        return loss, {"delta": error, "cosine_distance": cosine, "norm": norm}


def _examples(batch: GeneratorBatch) -> list[tuple[int, Tensor]]:
    return list(zip(batch.indices, batch.conditions, strict=True))
