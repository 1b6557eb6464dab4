"""A tiny pair of readers, questions about made-up passages, and channels as training would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stillhouse.data.records import ReadingQuestion, write_records
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.latentwire.channel import WEIGHTS, Channel
from stillhouse.studies.latentwire.config import EvaluationSettings
from stillhouse.studies.latentwire.evaluate import EvaluateStep
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.training.checkpoints import trained_tensors
from tests.latentwire.tiny_readers import FAMILIES

NAMES = ("Ada", "Ben", "Chen", "Dora")
RUN: dict[str, Any] = {
    "latent": {"length": 3, "dimension": 8},
    "encoder": {"layers": 1, "width": 16, "heads": 2},
    "adapter": {"hidden_multiple": 1},
    "reader": {"precision": "fp32"},
    "training": {"steps": 2, "batch_size": 2, "save_every": 1, "schedule": {"warmup_steps": 0}},
}


def questions(count: int, start: int = 0) -> list[ReadingQuestion]:
    """Questions with two gold answers each, about passages that differ in length."""
    records = []
    for number in range(start, start + count):
        name, filler = NAMES[number % 4], "The market was busy. " * (number % 3)
        records.append(
            ReadingQuestion(
                id=f"q/{number}",
                title=f"article {number // 2}",
                context=f"{filler}{name} has {number} apples and buys {number + 1} more.",
                question=f"How many apples does {name} buy?",
                answers=(f"{number + 1}", f"{number + 1} more"),
            )
        )
    return records


def make_data(directory: Path, train: int = 6, validation: int = 3, test: int = 4) -> Path:
    """Splits as the split step leaves them."""
    directory.mkdir(parents=True)
    for place, (name, count) in enumerate((("train", train), ("validation", validation), ("test", test))):
        write_records(directory / f"{name}.jsonl", questions(count, start=20 * place))
    write_manifest(directory)
    return directory


def run_settings(**changes: Any) -> RunSettings:
    """Settings of a channel that a test can build in no time."""
    return RunSettings.model_validate(RUN | changes)


def load_readers(paths: dict[str, Path], run: RunSettings) -> dict[str, Reader]:
    """Both families, in the pair's order."""
    return {name: Reader.load(name, paths[name], run.reader) for name in FAMILIES}


def evaluation_step(
    folder: Path, output: Path, channels: Sequence[Path], encoders: Sequence[Path] = (), **changes: Any
) -> EvaluateStep:
    """The evaluation of channels on the families and the `data` of `folder`, whose `work` keeps what is computed."""
    settings = {
        "generation": {"max_new_tokens": 3},
        "batch_size": 3,
        "wire": {"formats": ["fp16", "int4"], "headline": "int4"},
    }
    return EvaluateStep(
        models=tuple(folder / name for name in FAMILIES),
        data=folder / "data",
        channels=tuple(channels),
        encoders=tuple(encoders),
        results=output / "results.json",
        item_scores=output / "items.parquet",
        record=output / "run.json",
        wire=output / "wire",
        work=folder / "work",
        pair="tiny",
        model_names=FAMILIES,
        model_notes=("a", "b"),
        trust_remote_code=(False, False),
        dataset="tiny",
        dataset_note="made up",
        max_text_bytes=None,
        evaluation=EvaluationSettings.model_validate(settings | changes),
    )


def make_channel(
    directory: Path, readers: dict[str, Reader], run: RunSettings, condition: str = "latent", seed: int = 42
) -> Path:
    """A channel with two checkpoints: as built, and with other numbers."""
    channel = Channel.build(run, readers, seed, train_texts=("text",))
    for step in (1, 2):
        checkpoint = directory / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        tensors = {name: value.detach().clone() for name, value in trained_tensors(channel).items()}
        save_file(tensors, checkpoint / WEIGHTS)
        with torch.no_grad():
            channel.adapters["llama"].skip.weight.mul_(-1)  # type: ignore[union-attr, operator]
    write_json(
        directory / "run.json",
        {"settings": {"condition": condition, "seed": seed, "run": run.model_dump(mode="json")}},
    )
    write_manifest(directory)
    return directory
