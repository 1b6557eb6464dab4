"""Loading: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.errors import UserError
from tests.support.tiny_models import make_tiny_llama


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


def test_a_model_loads_in_evaluation_mode_and_freezes(directory: Path) -> None:
    model = load_model(directory, "fp32", "cpu")
    assert not model.training and model.dtype == torch.float32
    model.train()
    assert not any(parameter.requires_grad for parameter in frozen(model).parameters())
    assert not model.training


def test_master_weights_stay_in_fp32(directory: Path) -> None:
    assert load_model(directory, "bf16", "cpu").dtype == torch.bfloat16
    assert load_model(directory, "bf16", "cpu", master_weights=True).dtype == torch.float32


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    for load in (lambda: load_model(tmp_path / "none", "fp32"), lambda: load_tokenizer(tmp_path / "none")):
        with pytest.raises(UserError, match="none: no such model directory"):
            load()


def test_truncated_weights_are_named(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: is corrupt or half written"):
        load_model(directory, "fp32", "cpu")


def test_pickled_weights_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors weights"):
        load_model(directory, "fp32", "cpu")


def test_missing_tensors_are_not_filled_with_random_ones(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the weights lack 1 tensors \(model\.norm\.weight\)"):
        load_model(directory, "fp32", "cpu")


def test_an_unknown_architecture_is_a_clear_error(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"lama"'))
    with pytest.raises(UserError, match="transformers cannot load this model"):
        load_model(directory, "fp32", "cpu")


def test_a_damaged_tokenizer_is_a_clear_error(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(directory)


@pytest.mark.parametrize(("instructions", "expected"), [({}, "fp32"), ({"amx_bf16": True}, "bf16")])
def test_auto_takes_bf16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, instructions: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("fp32", cpu) == "fp32"
