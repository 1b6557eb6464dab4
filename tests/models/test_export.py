"""An exported model is the fake-quantised student: transformers loads it, and its logits are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_models import make_tiny_llama, tiny_llama_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import LoraSettings
from stillhouse.models.export import export_quantized, load_exported
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.lora import add_lora
from stillhouse.models.quantized_lora import RoundedLayer, fake_quantized, load_student

IDS = torch.randint(1, 384, (2, 9), generator=torch.Generator().manual_seed(1))
FORMATS = [
    WeightFormat(group_size=16),
    WeightFormat(group_size=32, symmetric=False),
    WeightFormat(kind="nvfp4", emulated=True),
    WeightFormat(kind="nf4"),
    WeightFormat(kind="fp4"),
]
FP32 = {"rtol": 1e-5, "atol": 1e-5}
BF16 = {"rtol": 2**-7, "atol": 2**-7}


def student(weight_format: WeightFormat, tied: bool = False, placement: str = "merged") -> PeftModel:
    torch.manual_seed(0)
    config = tiny_llama_config()
    # Whole blocks of 64: bitsandbytes' kernel for processors with bf16 takes no others.
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    config.tie_word_embeddings = tied
    config.attention_bias = True
    model = add_lora(LlamaForCausalLM(config).eval(), LoraSettings(rank=4, alpha=8, dropout=0.1), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    return fake_quantized(model, weight_format, placement).eval()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda each: each.name)
def test_reloaded_logits_are_those_of_the_fake_quantised_student(
    weight_format: WeightFormat, tied: bool, tmp_path: Path
) -> None:
    model = student(weight_format, tied)
    export_quantized(model, None, tmp_path)
    expected = model(input_ids=IDS).logits
    # compressed-tensors unpacks nvfp4 to bf16: 8 bits of precision.
    tolerance = BF16 if weight_format.kind == "nvfp4" else FP32
    torch.testing.assert_close(load_exported(tmp_path, "fp32")(input_ids=IDS).logits, expected, **tolerance)
    if weight_format.kind != "nvfp4":
        # Packed as they are, bitsandbytes' weights meet its own kernel, which computes in bf16 where a processor can.
        in_bf16 = weight_format.kind in ("nf4", "fp4") and has_avx512bf16()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, **(BF16 if in_bf16 else FP32))


@torch.no_grad()
def test_what_was_trained_beside_is_merged_before_it_is_converted(tmp_path: Path) -> None:
    beside = student(FORMATS[0], placement="beside")
    export_quantized(beside, None, tmp_path)
    expected = student(FORMATS[0], placement="merged")(input_ids=IDS).logits
    torch.testing.assert_close(load_exported(tmp_path, "fp32")(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_int4_weights_take_half_a_byte_each_and_their_scales(tmp_path: Path) -> None:
    model = student(FORMATS[0])
    export_quantized(model, None, tmp_path)
    layers = [module for module in model.modules() if isinstance(module, RoundedLayer)]
    weights = sum(layer.frozen.weight.numel() for layer in layers)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("weight_packed"))
    scales = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("weight_scale"))
    assert packed == weights / 2
    assert scales == weights / 16 * 4
    assert not any("lora" in name or "base_layer" in name for name in tensors)


@torch.no_grad()
def test_in_bf16_the_scales_are_rounded_in_training_as_they_are_in_the_file(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base")
    model = load_student(tmp_path / "base", None, FORMATS[0], precision="bf16")
    export_quantized(model, load_tokenizer(tmp_path / "base"), tmp_path / "exported")
    loaded = load_exported(tmp_path / "exported", "bf16")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)
