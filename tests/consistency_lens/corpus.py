"""A made-up corpus, its tokens and its activations of the tiny model, as the workflow's steps leave them.

Also a program: `python -m tests.consistency_lens.corpus STEP.json [--kill-after SHARDS]` extracts, and can kill itself;
of several processes each kills the main one after so many shards of its own, and leaves its pid beside STEP.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillhouse.runtime.files import write_manifest
from stillhouse.studies.consistency_lens import activations, shards, tokens
from stillhouse.studies.consistency_lens.activations import ActivationsStep
from stillhouse.studies.consistency_lens.config import TokenSettings
from stillhouse.studies.consistency_lens.run_settings import ActivationSettings, PositionSettings
from stillhouse.studies.consistency_lens.tokens import TokensStep

REPOSITORY = Path(__file__).parents[2]
SIZES = {"train": 20, "validation": 6, "test": 8}
WORDS = ["Ada", "Ben", "has", "3", "apples", "books", "and", "buys", "12", "more", "coins", "How", "many", "?"]


def make_corpus(directory: Path, sizes: dict[str, int] = SIZES, longest: int = 30) -> Path:
    """Splits of made-up passages of 8 to `longest` words, with a manifest."""
    directory.mkdir(parents=True)
    chance = random.Random(0)
    for split, count in sizes.items():
        lines = [
            json.dumps(
                {"id": f"{split}-{number}", "text": " ".join(chance.choices(WORDS, k=chance.randint(8, longest)))}
            )
            for number in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    write_manifest(directory)
    return directory


def tokenise(model: Path, data: Path, output: Path, **changes: Any) -> Path:
    """The token artefact."""
    settings = TokenSettings(max_length=64, shard_documents=6, **changes)
    tokens.main(TokensStep(model=model, data=data, output=output, work=output.parent / "work", tokens=settings))
    return output


def activation_settings(**changes: Any) -> ActivationSettings:
    """Layer 1 of the tiny model at random positions, in fp32."""
    settings: dict[str, Any] = {
        "layer": 1,
        "positions": PositionSettings(policy="random", minimum=3),
        "max_length": 32,
        "dtype": "float32",
        "precision": "fp32",
    }
    return ActivationSettings.model_validate(settings | changes)


def extraction_step(model: Path, tokens_directory: Path, output: Path, **changes: Any) -> ActivationsStep:
    """The step that extracts six documents a shard."""
    step: dict[str, Any] = {
        "model": model,
        "tokens": tokens_directory,
        "output": output,
        "work": output.parent / f"work-{output.name}",
        "activations": activation_settings(),
        "batch_tokens": 64,
        "shard_documents": 6,
    }
    return ActivationsStep.model_validate(step | changes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", type=Path)
    parser.add_argument("--kill-after", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = ActivationsStep.model_validate_json(arguments.step.read_text())
    if arguments.kill_after is not None and step.processes == 1:
        _die_while_writing(arguments.kill_after)
    elif arguments.kill_after is not None:
        extract = ExtractAndOrphan(arguments.step.parent, arguments.kill_after)
        activations.extract_shards = extract  # type: ignore[assignment]
    activations.main(step)


@dataclass(frozen=True)
class ExtractAndOrphan:
    """What a process of a parallel extraction does here: its part, and kill -9 to its parent in the midst of it."""

    folder: Path
    finished: int

    def __call__(self, step: ActivationsStep, work: Path, rank: int, processes: int, parent: int) -> None:
        (self.folder / f"{os.getpid()}.pid").touch()
        written: list[Path] = []
        write = shards.atomic_write_bytes

        def write_or_kill(path: Path, data: bytes) -> None:
            if len(written) == self.finished:
                with suppress(ProcessLookupError):
                    os.kill(parent, signal.SIGKILL)
                while os.getppid() == parent:
                    time.sleep(0.01)
            write(path, data)
            written.append(path)

        shards.atomic_write_bytes = write_or_kill  # type: ignore[attr-defined]
        activations.extract_shards(step, work, rank, processes, parent)


def _die_while_writing(finished: int) -> None:
    written: list[Path] = []
    write = shards.atomic_write_bytes

    def write_or_die(path: Path, data: bytes) -> None:
        if len(written) == finished:
            path.with_name(f".{path.name}.half").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)
        written.append(path)

    shards.atomic_write_bytes = write_or_die  # type: ignore[attr-defined]


if __name__ == "__main__":
    # By its name: processes of a parallel extraction import what they are given from there.
    importlib.import_module("tests.consistency_lens.corpus").main()
