"""A tiny task, its sequences, a student with a LoRA that already does something, and caches of the base's targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_models import word_problems

from stillhouse.config.training import LoraSettings
from stillhouse.data.prompts import PromptRenderer, prompt_renderer
from stillhouse.data.records import MathProblem
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.lora import add_lora
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.context_distillation.run_settings import CacheSettings, ContextSettings
from stillhouse.studies.context_distillation.teacher import TeacherStep, main

EXAMPLES = 10
CONTEXTS = {
    "per_example": ContextSettings(shots=2),
    "grouped": ContextSettings(shots=2, sampling="grouped", groups=3),
    "fixed": ContextSettings(shots=2, sampling="fixed"),
}
BuildCache = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of width 32 are faster without waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def problems() -> list[MathProblem]:
    return [MathProblem(**row) for row in word_problems(EXAMPLES)]


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("task")
    rows = "".join(json.dumps(row) + "\n" for row in word_problems(EXAMPLES))
    (directory / "train.jsonl").write_text(rows)
    write_manifest(directory)
    return directory


@pytest.fixture(scope="session")
def renderer(tiny_model: Path) -> PromptRenderer:
    return prompt_renderer(load_tokenizer(tiny_model))


@pytest.fixture
def student(tiny_model: Path):
    """The tiny model with a LoRA on the attention, away from its zero start and without dropout, in training mode."""
    settings = LoraSettings(rank=2, alpha=4, dropout=0, target_modules=("q_proj", "v_proj"))
    model = add_lora(load_model(tiny_model, "fp32"), settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.train()


def cache_settings(mode: str, context: ContextSettings, **changes: object) -> CacheSettings:
    values: dict[str, object] = {
        "mode": mode,
        "model": None,
        "adapter": False,
        "context": context,
        "max_length": 2048,
        "top_k": 16 if mode == "top_k" else 0,
        "precision": "fp32",
        "batch_tokens": 512,
        "prompt_format": "auto",
        "overlong": "error",
        "train_examples": None,
    }
    return CacheSettings.model_validate(values | changes)


@pytest.fixture(scope="session")
def build_cache(tiny_model: Path, task_data: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildCache:
    """Build a cache with the step program, once for each of its settings."""
    built: dict[str, Path] = {}

    def build(mode: str, context: ContextSettings) -> Path:
        cache = cache_settings(mode, context)
        if cache.name not in built:
            directory = tmp_path_factory.mktemp("cache")
            output = directory / "out"
            main(
                TeacherStep(
                    data=task_data,
                    student=tiny_model,
                    teacher=tiny_model,
                    output=output,
                    work=directory / "work",
                    cache=cache,
                )
            )
            built[cache.name] = output
        return built[cache.name]

    return build
