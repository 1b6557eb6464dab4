"""Adapters from outside act as peft's merged model does, one or many in a pass, and leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.functional_lora import applied, functional_forward
from stillhouse.models.loading import frozen, load_model
from stillhouse.models.lora_tensors import AdapterTensors, model_layout, stacked, write_adapter
from stillhouse.runtime.errors import UserError

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return frozen(load_model(tiny_model, "fp32", "cpu"))


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """Three rows, the last of which is padded on the right."""
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def adapter(model: PreTrainedModel, seed: int, rank: int = 4) -> AdapterTensors:
    layout = model_layout(model, TARGETS, rank, 8)
    draw = torch.Generator().manual_seed(seed)
    return AdapterTensors(
        {module.name: 0.1 * torch.randn(rank, module.inputs, generator=draw) for module in layout.modules},
        {module.name: 0.1 * torch.randn(module.outputs, rank, generator=draw) for module in layout.modules},
        layout,
    )


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: tensor.repeat(times, 1) for name, tensor in inputs.items()}


def learnt(given: AdapterTensors) -> tuple[AdapterTensors, list[Tensor]]:
    own = given.map(lambda tensor: tensor.clone().requires_grad_())
    return own, [*own.a.values(), *own.b.values()]


def test_hooks_and_changed_weights_equal_pefts_merged_model(
    model: PreTrainedModel, inputs: dict[str, Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    given = adapter(model, 1)
    write_adapter(given, tmp_path, "tiny")
    merged = PeftModel.from_pretrained(load_model(tiny_model, "fp32", "cpu"), str(tmp_path)).merge_and_unload()
    expected = merged(**inputs).logits
    with applied(model, given):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(functional_forward(model, given, **inputs).logits, expected, atol=2e-5, rtol=1e-5)
    assert (model(**inputs).logits - expected).abs().max() > 0.1


def test_hooks_and_changed_weights_have_equal_gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    gradients = []
    for hooks in (True, False):
        own, tensors = learnt(adapter(model, 1))
        if hooks:
            with applied(model, own):
                logits = model(**inputs).logits
        else:
            logits = functional_forward(model, own, **inputs).logits
        gradients.append(torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), tensors))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert ours.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_adapters_equals_them_one_by_one(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    adapters = [adapter(model, seed) for seed in (1, 2, 3)]
    batch, tensors = learnt(stacked(adapters))
    with applied(model, batch):
        together = model(**repeated(inputs, 3)).logits.unflatten(0, (3, 3))
    gradients = torch.autograd.grad(together.log_softmax(-1)[..., 5].sum(), tensors)
    for place, one in enumerate(adapters):
        own, own_tensors = learnt(one)
        with applied(model, own):
            alone = model(**inputs).logits
        torch.testing.assert_close(together[place], alone, atol=2e-5, rtol=1e-5)
        own_gradients = torch.autograd.grad(alone.log_softmax(-1)[..., 5].sum(), own_tensors)
        for whole, part in zip(gradients, own_gradients, strict=True):
            torch.testing.assert_close(whole[place], part, atol=1e-4, rtol=1e-4)


def test_the_model_is_as_it_was_even_after_an_error(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(**inputs).logits
    two = stacked([adapter(model, 1), adapter(model, 2)])
    with pytest.raises(ValueError, match="3 rows cannot be shared out to 2 adapters"), applied(model, two):
        model(**inputs)
    functional_forward(model, adapter(model, 1), **inputs)
    assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter_of_another_base_is_refused(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    given = adapter(model, 1)
    layout = given.layout.__class__(given.layout.modules[1:], 4, 8)
    with (
        pytest.raises(UserError, match="is of another base model"),
        applied(model, AdapterTensors(given.a, given.b, layout)),
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="one adapter at a time"):
        functional_forward(model, stacked([given, given]), **inputs)


def test_an_fp32_adapter_on_a_bf16_model_leaves_its_type(tiny_model: Path, inputs: dict[str, Tensor]) -> None:
    model = frozen(load_model(tiny_model, "fp32", "cpu")).bfloat16()
    with applied(model, adapter(model, 1)):
        assert model(**inputs).logits.dtype == torch.bfloat16
