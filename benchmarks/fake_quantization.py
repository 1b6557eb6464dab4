"""A fake-quantised LoRA step in int4: rounded layers beside torchao's QAT layers under peft.

torchao prepares the base for quantisation-aware training and peft puts LoRA beside it, Q(W)x + BAx; `beside` here is
the same function. `merged`, Q(W + BA)x, is what is deployed, and what the two libraries do not offer: its reference is
plain autograd through the merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, adapted, loss_and_gradients, model_directory, random_ids, student
from stillhouse.config.quantization import LoraQuantisation, WeightFormat
from stillhouse.models.loading import load_model
from stillhouse.models.quantization import fake_quantize
from stillhouse.models.quantized_lora import fake_quantized, quantized_once


def weight_format(scale: Scale) -> WeightFormat:
    """int4 with groups that divide every layer of the scale's model."""
    return WeightFormat(group_size=min(64, scale.width))


def our_student(placement: LoraQuantisation, folder: Path, scale: Scale) -> PeftModel:
    """A student of ours."""
    return fake_quantized(student(model_directory(folder, scale), scale), weight_format(scale), placement)


def torchao_student(folder: Path, scale: Scale) -> PeftModel:
    """The same from the two libraries, the adapter beside the rounded weight."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    base = load_model(model_directory(folder, scale), scale.precision)
    head = base.get_output_embeddings()
    grid = IntxWeightOnlyConfig(torch.int4, PerGroup(min(64, scale.width)))  # type: ignore[attr-defined]
    configuration = QATConfig(grid, step="prepare")
    quantize_(base, configuration, lambda module, name: isinstance(module, nn.Linear) and module is not head)
    return adapted(base, scale.rank)


def autograd_student(folder: Path, scale: Scale) -> PeftModel:
    """Merged by plain autograd: the weight of every layer is a node, and so is its rounding."""
    model = student(model_directory(folder, scale), scale)

    def merged(layer: LoraLinear, x: Tensor) -> Tensor:
        [name] = layer.active_adapters
        base: nn.Linear = layer.get_base_layer()
        # The order of ours: a weight that falls on the other side of a step of the grid is another function.
        weight = torch.addmm(
            base.weight, layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name]
        )
        rounded = weight + (fake_quantize(weight.detach(), weight_format(scale)) - weight).detach()
        return functional.linear(x, rounded, base.bias)

    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.forward = MethodType(merged, module)
    return model


def rounded_step(make: Callable[[Path, Scale], PeftModel], folder: Path, scale: Scale) -> Work:
    """A forward and backward pass as an objective makes it: ours rounds every weight once at its start."""
    model = make(folder, scale)
    ids = torch.tensor([random_ids(scale.prompt + scale.answer, scale, row) for row in range(scale.batch)])
    ids = ids.to(model.device)

    def work() -> Outcome:
        with quantized_once(model):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return loss_and_gradients(model, functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()))

    return work


def rounded_floor(folder: Path, scale: Scale) -> Floor:
    """A step of the student's; the rounding reads and writes every weight once."""
    length = scale.prompt + scale.answer
    tokens = scale.batch * length
    needed = 2 * scale.operations(tokens, tokens * (length + 1) / 2, tokens)
    return Floor(needed, 4 * scale.weight_bytes, tokens)


FAKE_QUANTISATION = Benchmark(
    name="fake_quantisation",
    what="int4 merged-LoRA fake quantisation step",
    forms=(
        Form("torchao QAT + peft, adapter beside", "tool", partial(rounded_step, torchao_student)),
        Form("rounded layers, adapter beside", "other", partial(rounded_step, partial(our_student, "beside"))),
        Form("merged by autograd", "naive", partial(rounded_step, autograd_student), equals=None),
        Form("merged", "ours", partial(rounded_step, partial(our_student, "merged")), equals="merged by autograd"),
    ),
    aims=(Aim("torchao QAT + peft, adapter beside", "time", 1 / 1.2),),
    floor=rounded_floor,
    floor_formula="2 x forward(tokens, all rows through the lm_head)",
    remains="The rounding itself: some passes over every weight, element by element.",
)
