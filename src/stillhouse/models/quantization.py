"""Fake quantisation: weights rounded to a 4-bit format and back, exactly as the format's own library rounds them.

A fake-quantised weight is an ordinary tensor of the numbers that the format can hold. int4 is written out here (the
grid of torchao's `choose_qparams_affine`, fewer passes over memory); the others are the libraries' own conversions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.config.quantization import WeightFormat, this_machine
from stillhouse.runtime.errors import UserError

INT4_LOWEST, INT4_HIGHEST = -8, 7


@dataclass(frozen=True)
class Int4Weight:
    """A weight on the int4 grid: codes [out, groups, group] in -8..7 as floats, and one scale and zero point a group.

    scale: [out, groups, 1]. zero_point: [out, groups, 1], or None where symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, [out, in]; overwrites `codes`."""
        values = self.codes if self.zero_point is None else self.codes.sub_(self.zero_point)
        return values.mul_(self.scale).flatten(1)


def quantized_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that a weight format covers: every linear projection but the output embeddings, by name.

    Under peft's LoRA these are the frozen layers, named `<layer>.base_layer`; its own A and B are never rounded.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name:
            yield name, module


def require_format(model: PreTrainedModel, weight_format: WeightFormat) -> None:
    """Raise UserError where the machine lacks what the format needs, or its groups do not divide a layer."""
    if objection := weight_format.objection(this_machine()):
        raise UserError(objection)
    if weight_format.kind in ("nf4", "fp4"):
        return  # its blocks run over the flattened weight
    for name, layer in quantized_linears(model):
        if layer.in_features % weight_format.group:
            fitting = [size for size in (256, 128, 64, 32, 16) if layer.in_features % size == 0]
            raise UserError(
                f"format.group_size: {weight_format.group} does not divide the {layer.in_features} inputs of {name}: "
                f"choose one of {', '.join(map(str, fitting)) or 'its divisors'}"
            )


@torch.no_grad()
def fake_quantize(weight: Tensor, weight_format: WeightFormat, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] as the format holds it, without a gradient (`quantized_lora` passes one straight through).

    dtype: of the result, and of int4's stored scales; default: the weight's own.
    """
    dtype = dtype or weight.dtype
    match weight_format.kind:
        case "int4":
            return int4(weight, weight_format, dtype).dequantize().to(dtype)
        case "nvfp4":
            rounded: Tensor = nvfp4(weight).dequantize(dtype)
            return rounded
        case "nf4" | "fp4":
            return _unpacked(*bitsandbytes_4bit(weight, weight_format.kind)).to(dtype)


@torch.no_grad()
def int4(weight: Tensor, weight_format: WeightFormat, scale_dtype: torch.dtype) -> Int4Weight:
    """Round a weight [out, in] to the nearest codes of torchao's int4 grid, with scales that `scale_dtype` can hold.

    Symmetric: scale = max|w| / 7.5, so that a group's largest positive weight is clipped from 7.5 to 7. Asymmetric:
    scale = (max - min) / 15, with 0 always inside the range and a whole zero point.
    """
    groups = weight.unflatten(1, (-1, weight_format.group))
    smallest = torch.finfo(weight.dtype).smallest_normal
    if weight_format.symmetric:
        largest = torch.maximum(groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True).neg_())
        scale = largest.div_(7.5).clamp_(min=smallest)
        scale = scale.to(scale_dtype).to(weight.dtype)
        return Int4Weight((groups * scale.reciprocal()).round_().clamp_(INT4_LOWEST, INT4_HIGHEST), scale, None)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = high.sub_(low).div_(15).clamp_(min=smallest).to(scale_dtype).to(weight.dtype)
    zero_point = (INT4_LOWEST - (low / scale).round_()).clamp_(INT4_LOWEST, INT4_HIGHEST)
    codes = (groups * scale.reciprocal()).round_().add_(zero_point).clamp_(INT4_LOWEST, INT4_HIGHEST)
    return Int4Weight(codes, scale, zero_point)


@torch.no_grad()
def nvfp4(weight: Tensor) -> Any:
    """The weight as torchao's `NVFP4Tensor`: `qdata` two codes a byte, `scale` fp8 a group, `per_tensor_scale` fp32."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(torch.linalg.vector_norm(weight, torch.inf))
    return NVFP4Tensor.to_nvfp4(weight.contiguous(), per_tensor_scale=scale)


@torch.no_grad()
def bitsandbytes_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Any]:
    """The packed codes of bitsandbytes and its `QuantState`; kind: nf4 or fp4."""
    from bitsandbytes import functional

    packed: tuple[Tensor, Any] = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=kind)
    return packed


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes import functional

    values: Tensor = functional.dequantize_4bit(packed, state)
    return values
