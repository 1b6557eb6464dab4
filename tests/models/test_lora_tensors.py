"""Adapters as tensors: all tensors are matched, faulty files refused by name, and distances ignore the gauge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from stillhouse.config.training import LoraSettings
from stillhouse.models.loading import load_model
from stillhouse.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_lora
from stillhouse.models.lora_tensors import (
    AdapterTensors,
    adapter_digest,
    check_fits,
    check_same_layout,
    mean_adapter,
    model_layout,
    read_adapter,
    relative_error,
    squared_distance,
    squared_norm,
    stacked,
    write_adapter,
)
from stillhouse.runtime.errors import UserError

TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> PreTrainedModel:
    return load_model(tiny_model, "fp32", "cpu")


def random_adapter(base: PreTrainedModel, seed: int, rank: int = 3, alpha: float = 6) -> AdapterTensors:
    layout = model_layout(base, TARGETS, rank, alpha)
    draw = torch.Generator().manual_seed(seed)
    return AdapterTensors(
        {module.name: torch.randn(rank, module.inputs, generator=draw) for module in layout.modules},
        {module.name: torch.randn(module.outputs, rank, generator=draw) for module in layout.modules},
        layout,
    )


@pytest.fixture
def folder(base: PreTrainedModel, tmp_path: Path) -> Path:
    write_adapter(random_adapter(base, 1), tmp_path / "adapter", "tiny")
    return tmp_path / "adapter"


def equal(first: AdapterTensors, second: AdapterTensors) -> bool:
    return adapter_digest(first) == adapter_digest(second)


def test_an_adapter_that_peft_wrote_is_read_whole(tiny_model: Path, tmp_path: Path) -> None:
    model = add_lora(load_model(tiny_model, "fp32", "cpu"), LoraSettings(rank=4, alpha=8, target_modules=TARGETS), 1)
    model.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path)
    assert adapter.layout == model_layout(load_model(tiny_model, "fp32", "cpu"), TARGETS, 4, 8)
    assert len(adapter.a) + len(adapter.b) == len(load_file(tmp_path / ADAPTER_WEIGHTS)) == 2 * 2 * 2
    for name, tensor in load_file(tmp_path / ADAPTER_WEIGHTS).items():
        own = adapter.a if "lora_A" in name else adapter.b
        assert torch.equal(own[name.removeprefix("base_model.model.").rpartition(".lora_")[0]], tensor)


def test_a_written_adapter_is_what_peft_merges_and_reads_back_equal(base: PreTrainedModel, tmp_path: Path) -> None:
    adapter = random_adapter(base, 3)
    write_adapter(adapter, tmp_path, "tiny")
    assert equal(read_adapter(tmp_path), adapter)
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    for module in adapter.layout.modules:
        changed = merged.get_parameter(f"{module.name}.weight") - weights[f"{module.name}.weight"]
        torch.testing.assert_close(changed, adapter.delta_w(module.name), atol=1e-5, rtol=1e-5)
        assert adapter.delta_w(module.name).abs().max() > 1
    base.load_state_dict(weights)


def test_layers_stand_in_the_models_order(base: PreTrainedModel) -> None:
    names = [module.name for module in model_layout(base, TARGETS, 1, 1).modules]
    assert names == [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("mlp.down_proj", "self_attn.q_proj")
    ]


def test_a_batch_is_its_adapters(base: PreTrainedModel) -> None:
    adapters = [random_adapter(base, seed) for seed in (1, 2, 3)]
    batch = stacked(adapters)
    assert batch.count == 3
    assert adapters[0].count is None
    assert [equal(one, adapter) for one, adapter in zip(batch, adapters, strict=True)] == [True] * 3
    name = batch.layout.modules[0].name
    torch.testing.assert_close(mean_adapter(adapters).a[name], sum(adapter.a[name] for adapter in adapters) / 3)


def test_distances_equal_those_of_the_products(base: PreTrainedModel) -> None:
    first, second = random_adapter(base, 1), random_adapter(base, 2, rank=2, alpha=1)
    pairs = [(first.delta_w(module.name), second.delta_w(module.name)) for module in first.layout.modules]
    expected = sum(float((one - other).double().square().sum()) for one, other in pairs)
    norm = sum(float(other.double().square().sum()) for _, other in pairs)
    assert squared_distance(first, second).item() == pytest.approx(expected, rel=1e-6)
    assert squared_norm(second).item() == pytest.approx(norm, rel=1e-6)
    assert relative_error(first, second).item() == pytest.approx((expected / norm) ** 0.5, rel=1e-6)
    torch.testing.assert_close(
        squared_distance(stacked([first, first]), stacked([first, first])), torch.zeros(2).double(), atol=1e-6, rtol=0
    )


def test_other_factors_of_the_same_product_are_no_distance_away(base: PreTrainedModel) -> None:
    adapter = random_adapter(base, 1)
    mixing = torch.eye(3) + 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    other = AdapterTensors(
        {name: mixing.inverse() @ a for name, a in adapter.a.items()},
        {name: b @ mixing for name, b in adapter.b.items()},
        adapter.layout,
    )
    assert relative_error(other, adapter) < 1e-5
    assert adapter_digest(other) != adapter_digest(adapter) == adapter_digest(random_adapter(base, 1))


def test_gradients_of_the_distance_equal_those_of_the_products(base: PreTrainedModel) -> None:
    first, second = random_adapter(base, 1), random_adapter(base, 2)
    gradients = []
    for fast in (True, False):
        learnt = first.map(lambda tensor: tensor.clone().requires_grad_())
        names = [module.name for module in first.layout.modules]
        naive = sum((learnt.delta_w(name) - second.delta_w(name)).square().sum() for name in names)
        (squared_distance(learnt, second) if fast else naive).backward()
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in (*learnt.a.values(), *learnt.b.values())]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


def rewrite(folder: Path, **changes: object) -> None:
    configuration = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(configuration | changes))


def retensor(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / ADAPTER_WEIGHTS)


A_NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FAULTS = {
    "another rank": (lambda folder: rewrite(folder, r=4), ADAPTER_WEIGHTS, "not of rank 4"),
    "a rank that is no number": (lambda folder: rewrite(folder, r=None), ADAPTER_CONFIG, "r (None)"),
    "no list of targets": (lambda folder: rewrite(folder, target_modules="all-linear"), ADAPTER_CONFIG, "all-linear"),
    "a target without tensors": (
        lambda folder: rewrite(folder, target_modules=[*TARGETS, "v_proj"]),
        ADAPTER_WEIGHTS,
        "has no matrices of 'v_proj'",
    ),
    "a target too few": (lambda folder: rewrite(folder, target_modules=["q_proj"]), ADAPTER_WEIGHTS, "down_proj"),
    "more than plain LoRA": (lambda folder: rewrite(folder, use_dora=True), ADAPTER_CONFIG, "'use_dora' is True"),
    "half of a pair": (lambda folder: retensor(folder, {A_NAME: None}), ADAPTER_WEIGHTS, "only one of the two"),
    "a tensor of another kind": (
        lambda folder: retensor(folder, {"base_model.model.lm_head.weight": torch.ones(2)}),
        ADAPTER_WEIGHTS,
        "'base_model.model.lm_head.weight' is no LoRA matrix",
    ),
    "a corrupt file": (
        lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:200]),
        ADAPTER_WEIGHTS,
        "corrupt",
    ),
    "no weights": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), ADAPTER_WEIGHTS, "does not exist"),
    "no configuration": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), ADAPTER_CONFIG, "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_by_the_name_of_its_file(fault: str, folder: Path) -> None:
    spoil, file, reason = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    assert str(error.value).startswith(str(folder / file))
    assert reason in str(error.value)


def test_an_adapter_that_lacks_a_layer_of_the_base_does_not_fit(base: PreTrainedModel, folder: Path) -> None:
    layer = [name for name in load_file(folder / ADAPTER_WEIGHTS) if ".layers.1." in name]
    check_fits(read_adapter(folder).layout, base, folder)
    retensor(folder, dict.fromkeys(layer))
    with pytest.raises(UserError, match=r"adapter: is of another base model: .*layers.1.*missing \(2 modules\)"):
        check_fits(read_adapter(folder).layout, base, folder)


def test_adapters_of_other_rank_alpha_or_base_are_told_apart(base: PreTrainedModel) -> None:
    layout = random_adapter(base, 1).layout
    check_same_layout(layout, layout, "file")
    with pytest.raises(UserError, match=r"file: has rank 2, the other adapters 3"):
        check_same_layout(random_adapter(base, 1, rank=2).layout, layout, "file")
    with pytest.raises(UserError, match=r"file: has alpha 1, the other adapters 6"):
        check_same_layout(random_adapter(base, 1, alpha=1).layout, layout, "file")
    with pytest.raises(UserError, match=r"file: is of another base model: '.*layers.0.mlp.down_proj' is missing"):
        check_same_layout(model_layout(base, ("q_proj",), 3, 6), layout, "file")
