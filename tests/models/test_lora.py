"""LoRA: deterministic starts, checkpoints told apart, and a base that leaves the student as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from stillhouse.config.training import LoraSettings, TrainingSettings
from stillhouse.models.loading import load_model
from stillhouse.models.lora import adapter_disabled, add_lora, checkpoint_kind, load_checkpoint, load_trainable
from stillhouse.runtime.errors import UserError

TOKENS = torch.arange(12)[None]


@pytest.fixture
def base(tiny_model: Path) -> PreTrainedModel:
    return load_model(tiny_model, "fp32", "cpu")


def perturbed(model: PeftModel) -> PeftModel:
    """An adapter starts as zero; make it change something."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_same_seed_gives_the_same_adapter(tiny_model: Path) -> None:
    def adapter(seed: int) -> dict[str, torch.Tensor]:
        model = add_lora(load_model(tiny_model, "fp32", "cpu"), LoraSettings(rank=4), seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    before = torch.get_rng_state()
    torch.testing.assert_close(adapter(1), adapter(1), atol=0, rtol=0)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(*(next(iter(adapter(seed).values())) for seed in (1, 2)))


def test_an_unknown_target_module_is_refused_with_the_nearest(base: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="no linear module 'q_project'; nearest: 'q_proj'"):
        add_lora(base, LoraSettings(target_modules=("v_proj", "q_project")), 0)


def test_the_method_decides_what_is_trained(tiny_model: Path) -> None:
    lora = load_trainable(tiny_model, TrainingSettings(precision="fp32"), 0, "cpu")
    assert all(("lora_" in name) == p.requires_grad for name, p in lora.named_parameters())
    full = load_trainable(tiny_model, TrainingSettings(method="full", precision="bf16"), 0, "cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())


def test_the_base_behind_an_adapter_equals_the_model_without_one(tiny_model: Path, base: PreTrainedModel) -> None:
    expected = load_model(tiny_model, "fp32", "cpu")(TOKENS).logits
    model = perturbed(add_lora(base, LoraSettings(rank=4), 0)).train()
    with adapter_disabled(model) as teacher, torch.no_grad():
        torch.testing.assert_close(teacher(TOKENS).logits, expected)
    assert not torch.allclose(model(TOKENS).logits, expected, atol=1e-3)


def test_leaving_the_base_restores_every_mode_and_every_trained_parameter(base: PreTrainedModel) -> None:
    model = perturbed(add_lora(base, LoraSettings(rank=4, dropout=0.5), 0)).train()
    model.get_base_model().lm_head.eval()
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]

    with pytest.raises(RuntimeError, match="on purpose"), adapter_disabled(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("on purpose")

    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits), "dropout is still on"


def test_a_model_without_adapter_has_no_base_to_go_back_to(base: PreTrainedModel) -> None:
    with pytest.raises(TypeError), adapter_disabled(base):
        pass


def test_checkpoints_are_told_apart_by_their_files(tiny_model: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    add_lora(base, LoraSettings(rank=4), 0).save_pretrained(tmp_path / "adapter")
    assert checkpoint_kind(tmp_path / "adapter") == "lora"
    assert checkpoint_kind(tiny_model) == "full"
    with pytest.raises(UserError, match=r"neither adapter_config\.json nor config\.json"):
        checkpoint_kind(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint_kind(tmp_path / "none")


def test_adapters_replace_one_another_on_one_base(tiny_model: Path, tmp_path: Path) -> None:
    outputs = []
    for seed in (1, 2):
        model = perturbed(add_lora(load_model(tiny_model, "fp32", "cpu"), LoraSettings(rank=4), seed)).eval()
        model.save_pretrained(tmp_path / str(seed))
        outputs.append(model(TOKENS).logits)
    model: PreTrainedModel | PeftModel = load_model(tiny_model, "fp32", "cpu")
    for seed, expected in zip((1, 2), outputs, strict=True):
        model = load_checkpoint(model, tmp_path / str(seed))
        torch.testing.assert_close(model(TOKENS).logits, expected)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_damaged_or_foreign_adapter_is_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    add_lora(load_model(tiny_model, "fp32", "cpu"), LoraSettings(rank=4), 0).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(UserError, match="the adapter does not fit LlamaForCausalLM"):
        load_checkpoint(load_model(tiny_model, "fp32", "cpu"), tmp_path / "adapter")
    weights.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: is corrupt"):
        load_checkpoint(load_model(tiny_model, "fp32", "cpu"), tmp_path / "adapter")
