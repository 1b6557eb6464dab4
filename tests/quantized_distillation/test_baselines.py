"""GPTQ and AWQ through llmcompressor for real, in its environment; without it one line says so.

The environment is the one that the workflow has built, or is built here, a few packages over ours: it skips only where
they cannot be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import word_problems
from transformers import LlamaForCausalLM

from stillhouse.assets.environment import EnvironmentStep
from stillhouse.assets.environment import main as build
from stillhouse.config.quantization import WeightFormat
from stillhouse.data.prompts import prompt_renderer
from stillhouse.models.export import load_exported
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.quantization import fake_quantize, quantized_linears
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.quantized_distillation.baselines import calibration_rows, compress
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.evaluation_settings import (
    AWQ_NEEDS_A_GPU,
    BaselineSettings,
    CalibratedMethod,
)

ROOT = Path(__file__).resolve().parents[2]
BUILT_BY_THE_WORKFLOW = ROOT / "resources/environments/llmcompressor"
NEEDS_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=AWQ_NEEDS_A_GPU))


@pytest.fixture(scope="session")
def llmcompressor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that has llmcompressor."""
    if BUILT_BY_THE_WORKFLOW.exists():
        return BUILT_BY_THE_WORKFLOW
    output = tmp_path_factory.mktemp("environments") / "llmcompressor"
    try:
        build(EnvironmentStep(requirements=ROOT / "envs/llmcompressor.txt", output=output))
    except UserError as error:
        pytest.skip(f"llmcompressor cannot be installed: {error}")
    return output


def test_a_missing_llmcompressor_is_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(UserError, match=r"condition gptq: llmcompressor cannot be imported .*envs/llmcompressor\.txt"):
        compress(load_model(tiny_model, "fp32"), [[1, 2, 3]], "gptq", WeightFormat(group_size=16))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=NEEDS_A_GPU)])
def test_calibrated_weights_are_read_back_and_nearer_to_the_model_than_rounding_to_nearest(
    method: CalibratedMethod, llmcompressor: Path, tiny_model: Path, tmp_path: Path
) -> None:
    chosen = BaselineSettings().weight_format(method, WeightFormat(group_size=16))
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(problem) + "\n" for problem in word_problems(64))
    (tmp_path / "data/train.jsonl").write_text(lines)
    write_manifest(tmp_path / "data")
    settings = {
        "model": tiny_model,
        "data": tmp_path / "data",
        "environment": llmcompressor,
        "output": tmp_path / method,
        "method": method,
        "format": chosen.model_dump_json(),
        "baselines": "{samples: 16, tokens: 64}",
        "rendering": "{prompt_format: plain, max_length: 64, response_room: 4}",
        "precision": "fp32",
    }
    module = "stillhouse.studies.quantized_distillation.baselines"
    arguments = [f"{key}={value}" for key, value in settings.items()]
    path = os.pathsep.join([str(llmcompressor), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=os.environ | {"PYTHONPATH": path})
    assert read_json(tmp_path / method / "run.json")["calibration_tokens"] == 16 * 64

    # On the CPU, wherever they were calibrated.
    teacher, ptq = (load_model(tiny_model, "fp32", device="cpu") for _ in range(2))
    calibrated = load_exported(tmp_path / method, "fp32").cpu()
    for _, layer in quantized_linears(ptq):
        layer.weight.copy_(fake_quantize(layer.weight, chosen))
    for (_, layer), (_, rounded) in zip(quantized_linears(calibrated), quantized_linears(ptq), strict=True):
        assert all(len(group.unique()) <= 16 for group in layer.weight.unflatten(1, (-1, chosen.group)).flatten(0, 1))
        assert not torch.equal(layer.weight, rounded.weight)
    renderer = prompt_renderer(load_tokenizer(tiny_model), "plain")
    examples = read_instructions(tmp_path / "data/train.jsonl", renderer, 64, 4).sequences
    ids = torch.tensor(calibration_rows(examples, BaselineSettings(samples=16, tokens=64)))

    def distance(model: LlamaForCausalLM) -> float:
        return float((model(input_ids=ids).logits - teacher(input_ids=ids).logits).square().mean())

    assert distance(calibrated) < distance(ptq)
