"""A student's forward and backward pass: rounded LoRA layers beside torchao's QAT layers under peft, int4.

    PYTHONPATH=src:. python benchmarks/fake_quantization.py [model=DIRECTORY] [group_size=64] [tokens=512] [repeats=3]

Without a model, a random Llama of 4 layers of width 256 is made. torchao prepares the base for quantisation-aware
training and peft puts LoRA beside it, Q(W)x + BAx: `beside` here is the same function, and its loss must equal that of
torchao before anything is timed. `merged`, Q(W + BA)x, is what torchao and peft do not offer. Forms take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from benchmarks.consistency_lens import make_model, seconds
from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import LoraSettings
from stillhouse.models.loading import load_model
from stillhouse.models.lora import add_lora
from stillhouse.models.quantized_lora import fake_quantized, quantized_once
from stillhouse.runtime.commands import run_step

LORA = LoraSettings(rank=32, alpha=64, dropout=0.0)


class Benchmark(StrictModel):
    """The command line."""

    model: Path | None = None
    group_size: Annotated[int, Field(ge=2)] = 64
    tokens: Annotated[int, Field(ge=2)] = 512
    repeats: Annotated[int, Field(ge=1)] = 3


def main(settings: Benchmark) -> None:
    """Print seconds of a pass in each form, the best of the repeats, and its time as a multiple of torchao's."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = settings.model or make_model(Path(folder) / "model")
        students = {
            "torchao QAT + peft": torchao_student(model_dir, settings.group_size),
            "beside": student(model_dir, settings.group_size, "beside"),
            "merged": student(model_dir, settings.group_size, "merged"),
        }
        vocabulary = students["merged"].config.vocab_size
        ids = torch.randint(vocabulary, (1, settings.tokens), generator=torch.Generator().manual_seed(0))
        forms = {name: step(model, ids.to(model.device)) for name, model in students.items()}
        with torch.no_grad():
            torch.testing.assert_close(forms["beside"](), forms["torchao QAT + peft"](), rtol=1e-4, atol=1e-5)
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(settings.repeats):
            for name, form in forms.items():
                best[name] = min(best[name], seconds(form, 1))
    for name, time in best.items():
        print(f"{name:20s} {time:.3f} s, {time / best['torchao QAT + peft']:.2f} x torchao")


def student(model_dir: Path, group_size: int, placement: str) -> PeftModel:
    """A student of ours, its adapter away from zero."""
    model = _adapted(load_model(model_dir, "fp32"))
    return fake_quantized(model, WeightFormat(group_size=group_size), placement)  # type: ignore[arg-type]


def torchao_student(model_dir: Path, group_size: int) -> PeftModel:
    """The same from the two libraries."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    base = load_model(model_dir, "fp32")
    head = base.get_output_embeddings()
    configuration = QATConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(group_size)), step="prepare")
    quantize_(base, configuration, lambda module, name: isinstance(module, nn.Linear) and module is not head)
    return _adapted(base)


def step(model: PeftModel, ids: Tensor) -> Callable[[], Tensor]:
    """A pass as the objective makes it: ours rounds every weight once at its start."""

    def forward() -> Tensor:
        with quantized_once(model):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.log_softmax(-1).mean()

    return forward


def _adapted(base: nn.Module) -> PeftModel:
    model = add_lora(base, LORA, seed=0)  # type: ignore[arg-type]
    drawing = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=drawing) * 0.01).to(parameter.device)
    return model.train()


if __name__ == "__main__":
    run_step(Benchmark, main)
