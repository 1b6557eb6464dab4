"""Real conversion: a merged and quantised model as a directory that transformers loads.

int4 (in the layout that vLLM reads, see docs/protocol.md) and nvfp4 are written as compressed-tensors packs them, nf4
and fp4 as bitsandbytes does. The numbers are those of `quantization`: codes and scales are computed there, not by the
packing library, so that the exported model computes what the fake-quantised one did. Plain transformers computes with
what is written too; nvfp4 in bf16 alone, to which compressed-tensors unpacks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import Precision
from stillhouse.models.loading import load_model
from stillhouse.models.quantization import bitsandbytes_4bit, int4, nvfp4
from stillhouse.models.quantized_lora import RoundedLayer, rounding_of
from stillhouse.runtime.files import read_json, write_json


def export_quantized(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path
) -> None:
    """Write a model that `fake_quantized` has gone over, its adapter merged and its weights converted, to `directory`.

    A student that was trained with the adapter beside the weights is merged here too. The caller stages the directory
    and writes its manifest.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    weight_format = rounding_of(model).weight_format
    tensors: dict[str, Tensor] = {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, RoundedLayer)}
    for name, layer in layers.items():
        stored = _stored(layer.merged_weight().detach(), weight_format, layer.frozen.weight.dtype)
        tensors |= {f"{name}.{key}": tensor.contiguous().cpu() for key, tensor in stored.items()}
        if layer.frozen.bias is not None:
            tensors[f"{name}.bias"] = layer.frozen.bias.detach()
    converted = tuple(f"{name}." for name in layers)
    tensors |= {name: tensor for name, tensor in base.state_dict().items() if not name.startswith(converted)}
    base.save_pretrained(directory, state_dict=tensors)
    configuration = read_json(directory / "config.json")
    dtype = str(base.dtype).removeprefix("torch.")
    description = _bitsandbytes if weight_format.kind in ("nf4", "fp4") else _compressed_tensors
    configuration |= {"dtype": dtype, "quantization_config": description(weight_format, base, layers)}
    write_json(directory / "config.json", configuration)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def load_exported(
    directory: Path | str, precision: Precision = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load what `export_quantized` (or llmcompressor) wrote, in evaluation mode, its weights unpacked for speed.

    Unpacking rounds nothing anew, but that compressed-tensors unpacks nvfp4 to bf16. Raises `UserError` for a damaged
    directory.
    """
    model: Any = load_model(directory, precision, trust_remote_code=trust_remote_code)
    dtype = model.dtype
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()
    elif (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.compressor.decompress_model(model=model)
        for module in model.modules():  # not the model as a whole: rotary frequencies stay in fp32
            if isinstance(module, nn.Linear):
                module.to(dtype)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _stored(weight: Tensor, weight_format: WeightFormat, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for a weight [out, in] (fp32), by the names that the reading library expects.

    dtype: of the model, and so of int4's scales.
    """
    match weight_format.kind:
        case "int4":
            from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

            rounded = int4(weight, weight_format, dtype)
            stored = {
                "weight_packed": pack_to_int32(rounded.codes.flatten(1).to(torch.int8), 4),
                "weight_scale": rounded.scale[..., 0].to(dtype),
                "weight_shape": torch.tensor(weight.shape),
            }
            if rounded.zero_point is not None:
                stored["weight_zero_point"] = pack_to_int32(rounded.zero_point[..., 0].to(torch.int8), 4, packed_dim=0)
            return stored
        case "nvfp4":
            packed = nvfp4(weight)
            return {
                "weight_packed": packed.qdata.view(torch.uint8),
                "weight_scale": packed.scale,
                "weight_global_scale": packed.per_tensor_scale.reciprocal().reshape(1),
            }
        case "nf4" | "fp4":
            codes, state = bitsandbytes_4bit(weight, weight_format.kind)
            state.dtype = dtype
            return {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def _compressed_tensors(
    weight_format: WeightFormat, base: PreTrainedModel, layers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """`quantization_config` of a config.json, as vLLM and transformers read it."""
    integer = weight_format.kind == "int4"
    weights = {
        "num_bits": 4,
        "type": "int" if integer else "float",
        "strategy": "group" if integer else "tensor_group",
        "group_size": weight_format.group,
        "symmetric": weight_format.symmetric,
    }
    if not integer:
        weights["scale_dtype"] = "torch.float8_e4m3fn"
    layout = "pack-quantized" if integer else "nvfp4-pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": layout}},
        "ignore": _left_alone(base, layers),
    }


def _bitsandbytes(
    weight_format: WeightFormat, base: PreTrainedModel, layers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The same for bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": weight_format.kind,
        "bnb_4bit_compute_dtype": str(base.dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": _left_alone(base, layers),
    }


def _left_alone(base: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """Linear modules that keep their weights: the output embeddings."""
    inside = tuple(f"{name}." for name in layers)
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name not in layers and not name.startswith(inside)
    ]
