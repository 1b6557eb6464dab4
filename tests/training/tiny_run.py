"""A tiny training run: answer cross entropy on made-up word problems. Also a program, for tests that kill it.

python -m tests.training.tiny_run MODEL WORK OUTPUT [--kill-at STEP] [--kill-in-state STEP] [--method full] ...
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stillhouse.config.training import TrainingSettings
from stillhouse.data.packing import AnswerBatch, answer_rows_logits, micro_batches, pack, pad
from stillhouse.data.packing import Sequence as AnswerSequence
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.lora import load_trainable
from stillhouse.runtime.logs import configure_logging
from stillhouse.training.loop import TrainingResult, train
from stillhouse.training.objective import LossTerms
from stillhouse.training.processes import staged_output
from tests.support.tiny_models import word_problems

EXAMPLES = 20
REPOSITORY = Path(__file__).parents[2]


class ProblemData:
    """Word problems whose answers differ in length, packed or padded."""

    def __init__(self, model_directory: Path, packing: bool = True) -> None:
        tokenizer = load_tokenizer(model_directory)
        self.packing = packing
        self.sequences = []
        for index, problem in enumerate(word_problems(EXAMPLES)):
            prompt = tokenizer(f"Question: {problem['question']}\nAnswer:").input_ids
            answer = tokenizer(f" {problem['answer']}" * (1 + index % 3)).input_ids
            self.sequences.append(AnswerSequence(prompt + answer, len(prompt), problem["id"]))

    def __len__(self) -> int:
        return len(self.sequences)

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[AnswerBatch]:
        chosen = (self.sequences[index] for index in indices)
        for group in micro_batches(chosen, token_budget, padded=not self.packing):
            yield pack(group) if self.packing else pad(group)


class AnswerCrossEntropy:
    """The sum of the answer tokens' cross entropy; can kill its own process, to play a crash."""

    def __init__(self, kill_at: int | None = None, signal_number: int = signal.SIGKILL) -> None:
        self.kill_at, self.signal_number = kill_at, signal_number

    def __call__(self, model: nn.Module, micro_batch: AnswerBatch, step: int) -> LossTerms:
        if step == self.kill_at:
            os.kill(os.getpid(), self.signal_number)
        logits = answer_rows_logits(model, micro_batch).float()
        total = nn.functional.cross_entropy(logits, micro_batch.labels, reduction="sum")
        return LossTerms(total, micro_batch.answer_tokens, {"cross_entropy": total.detach()})


def tiny_settings(**changes: Any) -> TrainingSettings:
    """Eight updates of five examples, in fp32, without dropout unless asked."""
    settings: dict[str, Any] = {
        "steps": 8,
        "batch_size": 5,
        "micro_batch_tokens": 300,
        "learning_rate": 1e-2,
        "schedule": {"warmup_steps": 2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "precision": "fp32",
        "save_every": 4,
        "resume_every": 2,
    }
    return TrainingSettings.model_validate(settings | changes)


def tiny_train(
    model_directory: Path, folder: Path, settings: TrainingSettings, objective: Any = None, **options: Any
) -> tuple[nn.Module, TrainingResult]:
    """Train in `folder/work` and `folder/output`; returns the trained model and the result."""
    model = options.pop("model", None) or load_trainable(model_directory, settings, seed=1, device="cpu")
    result = train(
        model,
        objective or AnswerCrossEntropy(),
        ProblemData(model_directory, settings.packing),
        settings,
        work_dir=folder / "work",
        output_dir=options.pop("output_dir", folder / "output"),
        seed=options.pop("seed", 3),
        **options,
    )
    return model, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-rank", type=int, default=0)
    parser.add_argument("--terminate-at", type=int)
    parser.add_argument("--kill-in-state", type=int)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--sharding", default="none")
    arguments = parser.parse_args()
    configure_logging()
    torch.set_num_threads(1)
    if arguments.kill_in_state:
        _die_while_writing_state(arguments.kill_in_state)
    own_rank = int(os.environ.get("RANK", "0")) == arguments.kill_rank
    objective = AnswerCrossEntropy(arguments.kill_at if own_rank else None)
    if arguments.terminate_at:
        objective = AnswerCrossEntropy(arguments.terminate_at, signal.SIGTERM)
    lora = {"rank": 4, "alpha": 8, "dropout": arguments.dropout}
    settings = tiny_settings(method=arguments.method, lora=lora, sharding=arguments.sharding)
    tokenizer = load_tokenizer(arguments.model)
    with staged_output(arguments.folder / "output") as staging:
        model, result = tiny_train(
            arguments.model, arguments.folder, settings, objective, tokenizer=tokenizer, output_dir=staging
        )
    spread = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    # In one piece: the processes share a pipe.
    sys.stdout.write(f"processes: {result.processes}{' sharded' * spread}\n")


def _die_while_writing_state(step: int) -> None:
    from stillhouse.runtime.files import write_manifest
    from stillhouse.training import checkpoints

    def write_or_die(directory: Path) -> Any:
        if directory.name.startswith(f".state-{step}."):
            os.kill(os.getpid(), signal.SIGKILL)
        return write_manifest(directory)

    checkpoints.write_manifest = write_or_die  # type: ignore[assignment, attr-defined]


if __name__ == "__main__":
    main()
