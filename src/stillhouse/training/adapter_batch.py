"""Several LoRA adapters that train in one process over one frozen base, each as if it were alone.

A small training leaves a device idle; a batch of them fills it. The shared loop sees one model whose parameters are
the adapters'. Nothing couples them: every adapter has a loss, a normaliser and a gradient clip of its own
(`train(..., groups=model.groups(), clip_apart=True)`), AdamW works element by element, and the base stays in evaluation
mode. So each adapter comes out as it would alone, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.config.training import LoraSettings
from stillhouse.data.packing import AnswerBatch, answer_rows_logits, pad
from stillhouse.data.packing import Sequence as TokenSequence
from stillhouse.models.functional_lora import applied
from stillhouse.models.loading import frozen
from stillhouse.models.lora_tensors import AdapterTensors, LoraLayout, model_layout
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import generator
from stillhouse.training.objective import LossTerms
from stillhouse.training.optimizers import ParameterGroup


class AdapterBatch(nn.Module):
    """A frozen base with new adapters in fp32, which are all that learns.

    a, b: one list for each adapter, its matrices in the order of `layout.modules`.
    """

    def __init__(self, base: PreTrainedModel, settings: LoraSettings, starts: Sequence[int]) -> None:
        """One adapter per entry of `starts`, the seeds that draw their A (as peft does); B is zero.

        Raises `UserError` for a target module that the model lacks.
        """
        super().__init__()
        self.base = frozen(base)
        self.layout = model_layout(base, settings.target_modules, settings.rank, settings.alpha)
        for target in set(settings.target_modules) - set(self.layout.targets):
            raise UserError(f"lora.target_modules: {type(base).__name__} has no linear module '{target}'")
        self.a = nn.ModuleList(nn.ParameterList(initial_a(self.layout, start)) for start in starts)
        self.b = nn.ModuleList(
            nn.ParameterList(torch.zeros(module.outputs, self.layout.rank) for module in self.layout.modules)
            for _ in starts
        )

    def train(self, mode: bool = True) -> Self:
        """The base has no mode to change: dropout in it would tie the adapters to their place in the batch."""
        super().train(mode)
        self.base.eval()
        return self

    def adapters(self) -> AdapterTensors:
        """All adapters as a batch, differentiable in the parameters."""
        modules = list(enumerate(self.layout.modules))
        return AdapterTensors(
            {module.name: torch.stack([own.get_parameter(str(place)) for own in self.a]) for place, module in modules},
            {module.name: torch.stack([own.get_parameter(str(place)) for own in self.b]) for place, module in modules},
            self.layout,
        )

    def groups(self) -> list[ParameterGroup]:
        """One parameter group per adapter."""
        return [
            ParameterGroup(
                f"adapter_{number}",
                {
                    name: parameter
                    for name, parameter in self.named_parameters()
                    if name.startswith((f"a.{number}.", f"b.{number}."))
                },
            )
            for number in range(len(self.a))
        ]


def initial_a(layout: LoraLayout, seed: int) -> list[Tensor]:
    """A of each module as peft draws it: uniform within 1 / sqrt(inputs)."""
    random = generator(seed, "lora")
    bounds = [(module.inputs, 1 / math.sqrt(module.inputs)) for module in layout.modules]
    return [torch.empty(layout.rank, inputs).uniform_(-bound, bound, generator=random) for inputs, bound in bounds]


def checkpoint_adapter(checkpoint: Path, layout: LoraLayout, number: int) -> AdapterTensors:
    """One adapter of a `checkpoint-<step>/` that the loop has saved of an `AdapterBatch`."""
    tensors = load_file(checkpoint / "model.safetensors")
    modules = list(enumerate(layout.modules))
    return AdapterTensors(
        {module.name: tensors[f"a.{number}.{place}"] for place, module in modules},
        {module.name: tensors[f"b.{number}.{place}"] for place, module in modules},
        layout,
    )


@dataclass(frozen=True)
class AdapterMicroBatch:
    """The same number of sequences of each adapter, adapter after adapter, in one rectangle.

    normalisers: [adapters], the learnt tokens of each adapter in the whole update. first: of the update's parts.
    """

    answers: AnswerBatch
    normalisers: Tensor
    first: bool

    @property
    def tokens(self) -> int:
        """Tokens of the sequences, padding not counted."""
        return self.answers.tokens

    def to(self, device: torch.device) -> AdapterMicroBatch:
        """The same with its tensors on `device`."""
        return replace(self, answers=self.answers.to(device), normalisers=self.normalisers.to(device))


@dataclass(frozen=True)
class AdapterSequences:
    """Training data: example i is the i-th sequence of every adapter, `sequences[adapter][i]`."""

    sequences: Sequence[Sequence[TokenSequence]]

    def __post_init__(self) -> None:
        """Refuse adapters with unequally many examples: they would not see what each sees alone."""
        if len({len(own) for own in self.sequences}) != 1:
            raise ValueError("adapters that train together need equally many examples")

    def __len__(self) -> int:
        return len(self.sequences[0])

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[AdapterMicroBatch]:
        """The examples of one whole update; the budget counts the rectangle of all adapters.

        Within the update each adapter's examples stand by length: rectangles have little padding.
        """
        chosen = [sorted((own[index] for index in indices), key=len) for own in self.sequences]
        normalisers = torch.tensor([sum(len(s) - s.answer_start for s in own) for own in chosen])
        for number, columns in enumerate(self._groups(chosen, token_budget)):
            rows = [own[column] for own in chosen for column in columns]
            yield AdapterMicroBatch(pad(rows), normalisers, first=number == 0)

    def _groups(self, chosen: Sequence[Sequence[TokenSequence]], token_budget: int) -> Iterator[range]:
        """Consecutive examples whose rectangle stays within the budget."""
        longest = [max(len(own[column]) for own in chosen) for column in range(len(chosen[0]))]
        start = 0
        for end in range(1, len(longest) + 1):
            if end == len(longest) or max(longest[start : end + 1]) * (end + 1 - start) * len(chosen) > token_budget:
                yield range(start, end)
                start = end


class AdapterLosses:
    """The loop's objective: the sum over adapters of their mean NLL per learnt token, in nats.

    It counts one unit per update, so that every adapter gets the gradient of its own mean. `names` label the log.
    Needs a single process: the normalisers are those of the update as it sees it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, model: nn.Module, micro_batch: AdapterMicroBatch, step: int) -> LossTerms:
        """The loss of a micro-batch, with each adapter's share as `loss/<name>`."""
        assert isinstance(model, AdapterBatch)
        answers = micro_batch.answers
        with applied(model.base, model.adapters()):
            logits = answer_rows_logits(model.base, answers)
        nll = functional.cross_entropy(logits.float(), answers.labels, reduction="none")
        adapter_of_row = answers.example_of_row // (len(answers.sequences) // len(self.names))
        sums = torch.zeros(len(self.names), device=nll.device).index_add(0, adapter_of_row, nll)
        losses = sums / micro_batch.normalisers
        terms = {f"loss/{name}": loss.detach() for name, loss in zip(self.names, losses, strict=True)}
        return LossTerms(losses.sum(), int(micro_batch.first), terms)
