"""Parameter groups: which learning rate and which weight decay a parameter gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from stillhouse.runtime.errors import UserError
from stillhouse.training.optimizers import (
    ParameterGroup,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from tests.support.tiny_models import tiny_llama_config


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_llama_config())


def members(model: nn.Module, multipliers: dict[str, float]) -> dict[str, set[str]]:
    return {group.name: set(group.parameters) for group in parameter_groups(model, multipliers)}


def test_a_module_name_matches_whole_components_of_the_path(model: LlamaForCausalLM) -> None:
    groups = members(model, {"embed_tokens": 0.1})
    assert groups["embed_tokens"] == {"model.embed_tokens.weight"}
    # "norm" is the final norm, not the "input_layernorm" that contains its letters.
    assert members(model, {"norm": 0.5})["norm"] == {"model.norm.weight"}


def test_the_deepest_match_wins(model: LlamaForCausalLM) -> None:
    groups = members(model, {"layers.0": 0.1, "q_proj": 2.0})
    assert "model.layers.0.self_attn.q_proj.weight" in groups["q_proj"]
    assert "model.layers.0.self_attn.k_proj.weight" in groups["layers.0"]
    assert "model.layers.1.self_attn.k_proj.weight" in groups["base"]


def test_an_unknown_module_name_is_refused_with_the_nearest(model: LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match="'embed_token'; nearest: 'embed_tokens'"):
        parameter_groups(model, {"embed_token": 0.1})


def test_a_wholly_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), {})


def test_norms_and_biases_are_not_decayed_and_groups_scale_the_rate(model: LlamaForCausalLM) -> None:
    optimizer = build_optimizer(parameter_groups(model, {"lm_head": 0.5}), 1e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)
    assert set_learning_rate(optimizer, 1e-2, step=1) == {"base": 1e-2, "lm_head": 5e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_schedule_scales_a_group_and_freezes_it_where_it_has_no_value() -> None:
    model = nn.ModuleDict({"early": nn.Linear(2, 2), "late": nn.Linear(2, 2)})
    late = dict(model["late"].named_parameters(prefix="late"))
    groups = [
        ParameterGroup("early", dict(model["early"].named_parameters(prefix="early")), 2.0, lambda step: 0.5),
        ParameterGroup("late", late, 1.0, lambda step: None if step == 1 else 0.1),
    ]
    optimizer = build_optimizer(groups, 1.0, 0.0)
    assert set_learning_rate(optimizer, 1.0, step=1) == {"early": 1.0, "late": 0.0}
    assert not any(parameter.requires_grad for parameter in late.values())
    assert set_learning_rate(optimizer, 1.0, step=2) == {"early": 1.0, "late": 0.1}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.float32])
def test_lent_weights_are_copied_in_fp32_before_their_first_update_and_once(kept_in: torch.dtype) -> None:
    base = nn.Linear(3, 2).to(kept_in).requires_grad_(False)
    lent = {name: nn.Parameter(own.detach(), requires_grad=False) for name, own in base.named_parameters()}
    before = {name: own.clone() for name, own in base.named_parameters()}
    frozen_in = (1, 3)
    group = ParameterGroup("late", lent, schedule=lambda step: None if step in frozen_in else 1.0)
    optimizer = build_optimizer([group], 0.1, 0.0)
    set_learning_rate(optimizer, 0.1, step=1)
    optimizer.step()
    assert all(own.data_ptr() == base.get_parameter(name).data_ptr() for name, own in lent.items())
    assert not any(optimizer.state.values())

    places: list[set[int]] = []
    for step in (2, 3, 4):
        set_learning_rate(optimizer, 0.1, step)
        places.append({own.data_ptr() for own in lent.values()})
        if step == 2:
            for name, own in lent.items():
                assert own.dtype == torch.float32 and torch.equal(own, before[name].float())
        for own in lent.values():
            own.grad = torch.ones_like(own) if own.requires_grad else None
        optimizer.step()
    assert places[0] == places[1] == places[2] != {own.data_ptr() for own in base.parameters()}
    assert all(torch.equal(own, before[name]) for name, own in base.named_parameters())
    assert not any(torch.equal(own, before[name].float()) for name, own in lent.items())


def test_the_fused_update_is_that_of_one_tensor_after_another() -> None:
    drawing = torch.Generator().manual_seed(0)
    start = {"weight": torch.randn(8, 4, generator=drawing), "bias": torch.randn(4, generator=drawing)}
    ours, plain = ({name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2))
    fused = build_optimizer([ParameterGroup("base", ours)], 1e-2, weight_decay=0.1)
    naive = torch.optim.AdamW(
        [{"params": [plain["weight"]], "weight_decay": 0.1}, {"params": [plain["bias"]], "weight_decay": 0.0}],
        lr=1e-2,
        foreach=False,
        fused=False,
    )
    for _ in range(5):
        for name, value in start.items():
            ours[name].grad = torch.randn(value.shape, generator=drawing)
            plain[name].grad = ours[name].grad.clone()
        fused.step()
        naive.step()
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    assert not torch.allclose(ours["weight"], start["weight"], atol=1e-3)
