"""GPTQ through llmcompressor for real, where its environment was built; without it one line says so."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import word_problems
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.data.prompts import prompt_renderer
from stillhouse.models.export import load_exported
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.quantization import fake_quantize, quantized_linears
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.quantized_distillation.baselines import calibration_rows, compress
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.evaluation_settings import BaselineSettings

ENVIRONMENT = Path(__file__).resolve().parents[2] / "resources/environments/llmcompressor"
FORMAT = WeightFormat(group_size=16)


def llmcompressor_python() -> str:
    """The interpreter that has llmcompressor: ours, or the one of the environment that the workflow builds."""
    if importlib.util.find_spec("llmcompressor"):
        return sys.executable
    if (python := ENVIRONMENT / "bin/python").exists():
        return str(python)
    pytest.skip("llmcompressor is not installed: snakemake resources/environments/llmcompressor builds its environment")


def test_a_missing_llmcompressor_is_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(UserError, match=r"condition gptq: llmcompressor cannot be imported .*envs/llmcompressor\.txt"):
        compress(load_model(tiny_model, "fp32"), [[1, 2, 3]], "gptq", FORMAT)


@pytest.mark.slow
@torch.no_grad()
def test_gptq_is_read_back_and_nearer_to_the_model_than_rounding_to_nearest(tiny_model: Path, tmp_path: Path) -> None:
    python = llmcompressor_python()
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(problem) + "\n" for problem in word_problems(64))
    (tmp_path / "data/train.jsonl").write_text(lines)
    write_manifest(tmp_path / "data")
    settings = {
        "model": tiny_model,
        "data": tmp_path / "data",
        "environment": ENVIRONMENT,
        "output": tmp_path / "gptq",
        "method": "gptq",
        "format": "{group_size: 16}",
        "baselines": "{samples: 16, tokens: 64}",
        "rendering": "{prompt_format: plain, max_length: 64, response_room: 4}",
        "precision": "fp32",
    }
    module = "stillhouse.studies.quantized_distillation.baselines"
    subprocess.run([python, "-m", module, *(f"{key}={value}" for key, value in settings.items())], check=True)
    assert read_json(tmp_path / "gptq/run.json")["calibration_tokens"] == 16 * 64

    teacher, gptq = load_model(tiny_model, "fp32"), load_exported(tmp_path / "gptq", "fp32")
    ptq = load_model(tiny_model, "fp32")
    for _, layer in quantized_linears(ptq):
        layer.weight.copy_(fake_quantize(layer.weight, FORMAT))
    for (_, layer), (_, rounded) in zip(quantized_linears(gptq), quantized_linears(ptq), strict=True):
        assert all(len(group.unique()) <= 16 for group in layer.weight.unflatten(1, (-1, FORMAT.group)).flatten(0, 1))
        assert not torch.equal(layer.weight, rounded.weight)
    renderer = prompt_renderer(load_tokenizer(tiny_model), "plain")
    examples = read_instructions(tmp_path / "data/train.jsonl", renderer, 64, 4).sequences
    ids = torch.tensor(calibration_rows(examples, BaselineSettings(samples=16, tokens=64)))

    def distance(model: LlamaForCausalLM) -> float:
        return float((model(input_ids=ids).logits - teacher(input_ids=ids).logits).square().mean())

    assert distance(gptq) < distance(ptq)
