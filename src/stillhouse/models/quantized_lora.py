"""A 4-bit student and its full-precision teacher in one copy of the weights.

`fake_quantized` makes a model's linear projections, with or without peft's LoRA on them, compute with rounded weights:

- merged: y = Q(W + s BA) x, what is deployed once the adapter is merged and the weights are converted.
- beside: y = Q(W) x + s BA x, as published systems train it.

The rounding's gradient is straight through (arXiv 1308.3432): the gradient at Q(W + s BA) is taken for that of
W + s BA. W is frozen, so only A and B get one, and theirs factor: dL/dB = s g^T (x A^T), dL/dA = s (g B)^T x. The
[out, in] gradient of the weight, a third of a naive step's products, is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.config.quantization import LoraQuantisation, WeightFormat
from stillhouse.config.training import Precision
from stillhouse.models.loading import evaluation_mode, load_model
from stillhouse.models.lora import adapter_disabled, load_checkpoint
from stillhouse.models.quantization import fake_quantize, quantized_linears, require_format

Model = TypeVar("Model", PreTrainedModel, PeftModel)


@dataclass
class Rounding:
    """What the rounded layers of one model share: their format, where LoRA sits, and the switch to the teacher."""

    weight_format: WeightFormat
    placement: LoraQuantisation
    enabled: bool = True


def fake_quantized(model: Model, weight_format: WeightFormat, placement: LoraQuantisation = "merged") -> Model:
    """The same model, its linear projections (not the output embeddings) computing with rounded weights from now on.

    Parameters and their names stay as they are, and so does what peft saves. Raises `UserError` where the format does
    not fit the model or the machine.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    require_format(base, weight_format)
    rounding = Rounding(weight_format, placement)
    for module in list(model.modules()):
        if isinstance(module, LoraLinear):
            _become(module, RoundedLora, rounding)
    for name, linear in list(quantized_linears(base)):
        if not name.endswith(".base_layer"):
            _become(linear, RoundedLinear, rounding)
    return model


def load_student(
    model_directory: Path | str,
    checkpoint: Path | str | None,
    weight_format: WeightFormat,
    placement: LoraQuantisation = "merged",
    precision: Precision = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """A base with a trained adapter (None: without one, plain rounding to nearest), fake-quantised, for evaluation."""
    model: PreTrainedModel | PeftModel = load_model(model_directory, precision, trust_remote_code=trust_remote_code)
    if checkpoint is not None:
        model = load_checkpoint(model, checkpoint)
    return fake_quantized(model, weight_format, placement).requires_grad_(False).eval()


@contextmanager
def as_teacher(model: Model) -> Iterator[Model]:
    """The full-precision model behind a student, as a context: nothing rounded, adapter off, evaluation mode.

    Every module's training mode is restored exactly on leaving.
    """
    rounding = rounding_of(model)
    enabled, rounding.enabled = rounding.enabled, False
    try:
        if isinstance(model, PeftModel):
            with adapter_disabled(model):
                yield model
        else:
            with evaluation_mode(model):
                yield model
    finally:
        rounding.enabled = enabled


@contextmanager
def quantized_once(model: Model) -> Iterator[Model]:
    """Round every weight once for all the forward passes in the context: sampling, evaluation, micro-batches.

    Holds one rounded copy of the layers' weights meanwhile, so the adapter must not change inside.
    """
    layers = [module for module in model.modules() if isinstance(module, RoundedLayer) and module.held is None]
    try:
        for layer in layers:
            layer.held = layer.rounded_weight()
        yield model
    finally:
        for layer in layers:
            layer.held = None


def rounding_of(model: nn.Module) -> Rounding:
    """What the rounded layers of a model share; a TypeError where there are none."""
    for module in model.modules():
        if isinstance(module, RoundedLayer):
            return module.rounding
    raise TypeError("only a model that fake_quantized has gone over has a teacher behind it")


class RoundedLayer(nn.Module):
    """What both kinds of layer have; `held` is the rounded weight while `quantized_once` is in force."""

    rounding: Rounding
    held: Tensor | None

    @property
    def frozen(self) -> nn.Linear:
        """The layer that holds W and its bias, neither ever trained."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """W, or W + s BA where there is an adapter: [out, in] in fp32, not rounded."""
        return self.frozen.weight.float()

    def exact_weight(self) -> Tensor:
        """The weight [out, in] that is rounded, in fp32."""
        return self.merged_weight()

    def rounded_weight(self) -> Tensor:
        """The weight [out, in] that the layer computes with; no gradient."""
        if self.held is not None:
            return self.held
        with torch.no_grad():
            return fake_quantize(self.exact_weight(), self.rounding.weight_format, self.frozen.weight.dtype)


class RoundedLinear(RoundedLayer, nn.Linear):
    """A frozen projection without an adapter: y = Q(W) x, or W x for the teacher."""

    @property
    def frozen(self) -> nn.Linear:
        """The layer itself."""
        return self

    def forward(self, input: Tensor) -> Tensor:
        """inputs: [..., in]; returns [..., out]."""
        weight = self.rounded_weight() if self.rounding.enabled else self.weight
        return functional.linear(input, weight, self.bias)


class RoundedLora(RoundedLayer, LoraLinear):
    """A frozen projection with one LoRA adapter: see the module's description for the two places it may have.

    Dropout falls on the adapter's input alone. Merged, s BA (dropout(x) - x) is added: in evaluation that is nothing,
    and in training A and B get the gradients that they have in peft's own LoRA with the same mask.
    """

    # Of peft's layer, which is not typed.
    get_base_layer: Callable[[], nn.Linear]
    active_adapters: list[str]
    lora_A: dict[str, nn.Linear]  # noqa: N815 (their names)
    lora_B: dict[str, nn.Linear]  # noqa: N815
    scaling: dict[str, float]
    lora_dropout: dict[str, nn.Module]

    @property
    def frozen(self) -> nn.Linear:
        """The layer below the adapter."""
        return self.get_base_layer()

    def merged_weight(self) -> Tensor:
        """W + s BA."""
        lora_a, lora_b, scaling, _ = self._adapter()
        return torch.addmm(self.frozen.weight.float(), lora_b.weight.float(), lora_a.weight.float(), alpha=scaling)

    def exact_weight(self) -> Tensor:
        """W + s BA where the adapter is merged, W where it is beside or off."""
        alone = self.rounding.placement == "beside" or self.disable_adapters
        return self.frozen.weight.float() if alone else self.merged_weight()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in]; returns [..., out]."""
        base = self.frozen
        if not self.rounding.enabled:
            return functional.linear(x, base.weight, base.bias)
        rounded = self.rounded_weight()
        if self.disable_adapters:
            return functional.linear(x, rounded, base.bias)
        lora_a, lora_b, scaling, dropout = self._adapter()
        if self.rounding.placement == "beside":
            return functional.linear(x, rounded, base.bias) + self._through_adapter(dropout(x))
        product: Tensor = _MergedProduct.apply(x, rounded, lora_a.weight, lora_b.weight, scaling)
        result = product if base.bias is None else product + base.bias
        if self.training and isinstance(dropout, nn.Dropout):
            result = result + self._through_adapter(dropout(x) - x)
        return result

    def _through_adapter(self, x: Tensor) -> Tensor:
        lora_a, lora_b, scaling, _ = self._adapter()
        added: Tensor = lora_b(lora_a(x.to(lora_a.weight.dtype))) * scaling
        return added.to(x.dtype)

    def _adapter(self) -> tuple[nn.Linear, nn.Linear, float, nn.Module]:
        [name] = self.active_adapters
        return self.lora_A[name], self.lora_B[name], self.scaling[name], self.lora_dropout[name]


class _MergedProduct(torch.autograd.Function):
    """x Q^T with the gradient straight through Q to A and B, never forming that of the weight."""

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, rounded: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        """inputs: [..., in]; rounded: [out, in]; lora_a: [rank, in]; lora_b: [out, rank]."""
        inputs = inputs.to(rounded.dtype)
        context.save_for_backward(inputs, rounded, lora_a, lora_b)
        context.scaling = scaling
        return functional.linear(inputs, rounded)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        """See the module's description."""
        inputs, rounded, lora_a, lora_b = context.saved_tensors
        gradient = gradients[0].to(rounded.dtype)
        rows, columns = gradient.flatten(0, -2), inputs.flatten(0, -2)
        through_b = rows @ lora_b.to(rows.dtype)
        through_a = columns @ lora_a.to(columns.dtype).T
        return (
            gradient @ rounded if context.needs_input_grad[0] else None,
            None,
            (through_b.T @ columns).to(lora_a.dtype).mul_(context.scaling),
            (rows.T @ through_a).to(lora_b.dtype).mul_(context.scaling),
            None,
        )


def _become(module: nn.Module, kind: type[RoundedLayer], rounding: Rounding) -> None:
    # peft and transformers make the layers and save them by their names; only how they compute is another.
    module.__class__ = kind
    assert isinstance(module, kind)
    module.rounding, module.held = rounding, None
