"""Fake quantisation gives the numbers that the format's own library gives for the same tensor."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import Machine, WeightFormat
from stillhouse.models.quantization import fake_quantize, quantized_linears, require_format
from stillhouse.runtime.errors import UserError


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """Groups of ordinary size, one of zeros, one with an outlier, one positive throughout."""
    values = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    values[0, :32] = 0
    values[1, 5] = 3.0
    values[2, :32] = values[2, :32].abs() + 0.01
    return values.to(dtype)


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_llama_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_equals_torchao_conversion_of_the_same_tensor(
    dtype: torch.dtype, group_size: int, symmetric: bool
) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    layer = nn.Linear(128, 24, bias=False, dtype=dtype)
    layer.weight.data = weight(dtype)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    quantize_(layer, IntxWeightOnlyConfig(torch.int4, PerGroup(group_size), mapping))
    ours = fake_quantize(weight(dtype), WeightFormat(group_size=group_size, symmetric=symmetric))
    torch.testing.assert_close(ours, layer.weight.dequantize(), rtol=0, atol=0)


def test_int4_equals_torchao_fake_quantizer_of_quantisation_aware_training() -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True))(weight())
    torch.testing.assert_close(fake_quantize(weight(), WeightFormat(group_size=32)), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_kinds_equal_its_own_layer(kind: str) -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(128, 24, bias=False, quant_type=kind, compress_statistics=False)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight(), requires_grad=False, quant_type=kind, compress_statistics=False, module=layer
    )
    layer = layer.to("cpu")
    theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(fake_quantize(weight(), WeightFormat(kind=kind)), theirs, rtol=0, atol=0)


def test_nvfp4_equals_torchao_weight_only_conversion() -> None:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(128, 32, bias=False))
    model[0].weight.data = weight().repeat(2, 1)[:32].clone()
    ours = fake_quantize(model[0].weight.data, WeightFormat(kind="nvfp4", emulated=True))
    quantize_(model, NVFP4WeightOnlyConfig())
    torch.testing.assert_close(ours, model[0].weight.dequantize(), rtol=0, atol=0)


def test_scales_are_numbers_of_the_type_that_they_are_stored_in() -> None:
    rounded = fake_quantize(weight(), WeightFormat(group_size=32), torch.bfloat16)
    groups = rounded.unflatten(1, (-1, 32)).float()
    assert rounded.dtype == torch.bfloat16
    assert all(len(group.unique()) <= 16 for group in groups.flatten(0, 1))


def test_every_block_projection_is_covered_and_the_output_embeddings_are_not() -> None:
    names = {name.rpartition(".")[2] for name, _ in quantized_linears(tiny_llama())}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_group_that_does_not_divide_a_layer_is_refused_with_the_layer_and_sizes_that_do() -> None:
    with pytest.raises(UserError, match=r"format.group_size: 128 does not divide the 32 inputs of .*q_proj: .*32, 16"):
        require_format(tiny_llama(), WeightFormat(group_size=128))


def test_a_missing_library_and_missing_hardware_are_named() -> None:
    everything = frozenset({"torchao", "bitsandbytes", "compressed_tensors"})
    hopper, blackwell = Machine((9.0,), everything), Machine((9.0, 10.0), everything)
    assert "needs bitsandbytes, which is not installed" in str(
        WeightFormat(kind="nf4").objection(Machine((), frozenset({"torchao"})))
    )
    native, emulated = WeightFormat(kind="nvfp4"), WeightFormat(kind="nvfp4", emulated=True)
    assert "needs a GPU of compute capability 10.0 (found: 9.0): set emulated to true" in str(native.objection(hopper))
    assert native.objection(blackwell) is None
    assert emulated.objection(hopper) is None
    assert emulated.name == "nvfp4-emulated"
