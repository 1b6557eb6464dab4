"""Rounded layers against naive forms of themselves, and the teacher behind the student."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tiny_models import tiny_llama_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import LoraQuantisation, WeightFormat
from stillhouse.config.training import LoraSettings
from stillhouse.models.lora import add_lora
from stillhouse.models.quantization import fake_quantize, quantized_linears
from stillhouse.models.quantized_lora import (
    RoundedLayer,
    RoundedLora,
    as_teacher,
    fake_quantized,
    load_student,
    quantized_once,
)

FORMAT = WeightFormat(group_size=16)
IDS = torch.randint(1, 384, (2, 9), generator=torch.Generator().manual_seed(1))


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config()).eval()


def student(placement: LoraQuantisation, dropout: float = 0.0, **lora: object) -> PeftModel:
    """A student whose adapter has already learnt something."""
    model = add_lora(tiny_llama(), LoraSettings(rank=4, alpha=8, dropout=dropout, **lora), seed=0)
    drawing = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=drawing) * 0.05
    return fake_quantized(model, FORMAT, placement)


def rounded_layers(model: nn.Module) -> list[RoundedLora]:
    return [module for module in model.modules() if isinstance(module, RoundedLora)]


@pytest.mark.parametrize("placement", ["merged", "beside"])
def test_a_layer_and_its_gradients_equal_naive_straight_through_autograd(placement: LoraQuantisation) -> None:
    layer = rounded_layers(student(placement))[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]
    x = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, weight.shape[0])

    def straight_through(exact: Tensor) -> Tensor:
        return exact + (fake_quantize(exact, FORMAT) - exact).detach()

    if placement == "merged":
        naive = functional.linear(x, straight_through(torch.addmm(weight, b, a, alpha=scaling)))
    else:
        naive = functional.linear(x, straight_through(weight)) + scaling * (x @ a.T @ b.T)
    ours = layer(x)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(naive, (x, a, b), upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, a, b), upstream), expected, rtol=1e-4, atol=1e-5)


def test_merged_dropout_leaves_the_gradients_of_ordinary_lora_with_the_same_mask() -> None:
    layer = rounded_layers(student("merged", dropout=0.5))[0].train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, upstream = torch.randn(3, 32), torch.randn(3, layer.out_features)
    torch.manual_seed(5)
    ours = torch.autograd.grad(layer(x), (a, b), upstream)
    torch.manual_seed(5)
    dropped = functional.dropout(x, 0.5)
    ordinary = functional.linear(x, layer.base_layer.weight) + layer.scaling["default"] * (dropped @ a.T @ b.T)
    torch.testing.assert_close(ours, torch.autograd.grad(ordinary, (a, b), upstream), rtol=1e-4, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(x), functional.linear(x, layer.rounded_weight()))


def test_the_merged_student_computes_what_the_merged_and_rounded_model_does() -> None:
    model = student("merged")
    merged = copy.deepcopy(model)
    for layer in rounded_layers(merged):
        layer.base_layer.weight.data = fake_quantize(layer.merged_weight(), FORMAT)
    with merged.disable_adapter(), torch.no_grad():
        for layer in rounded_layers(merged):
            layer.rounding.enabled = False
        expected = merged(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["merged", "beside"])
def test_the_teacher_is_the_untouched_model_and_the_student_comes_back_as_it_was(placement: LoraQuantisation) -> None:
    model = student(placement, dropout=0.1).train()
    modes = [module.training for module in model.modules()]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        with as_teacher(model):
            teacher = model(input_ids=IDS).logits
        torch.testing.assert_close(teacher, tiny_llama()(input_ids=IDS).logits)
        assert not torch.allclose(model(input_ids=IDS).logits, teacher, atol=1e-3)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert trained and all(".lora_" in name for name in trained)


def test_an_error_inside_the_teacher_does_not_leave_the_student_unrounded() -> None:
    model = student("merged")
    before = model(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="stop"), as_teacher(model):
        raise RuntimeError("stop")
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("placement", ["merged", "beside"])
def test_rounding_once_changes_nothing_but_the_work(
    placement: LoraQuantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = student(placement)
    calls: list[int] = []
    monkeypatch.setattr(
        "stillhouse.models.quantized_lora.fake_quantize", lambda *a: calls.append(1) or fake_quantize(*a)
    )

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS).logits.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected, layers = gradients(), len(rounded_layers(model))
    assert len(calls) == layers
    with quantized_once(model):
        first, second = gradients(), gradients()
    assert len(calls) == 2 * layers
    for result in (first, second):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert all(module.held is None for module in model.modules() if isinstance(module, RoundedLayer))


def test_projections_without_an_adapter_are_rounded_too() -> None:
    model = student("merged", target_modules=("q_proj",))
    reference = tiny_llama()
    for _, linear in quantized_linears(reference):
        linear.weight.data = fake_quantize(linear.weight.data, FORMAT)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_leaves_the_gradients_unchanged() -> None:
    model = student("merged").train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with quantized_once(model):
            loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_comes_back_as_the_same_student(tmp_path: Path) -> None:
    model = student("merged").eval()
    tiny_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = load_student(tmp_path / "base", tmp_path / "adapter", FORMAT, "merged", "fp32")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    plain = load_student(tmp_path / "base", None, FORMAT, precision="fp32")
    with model.disable_adapter():
        torch.testing.assert_close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)
