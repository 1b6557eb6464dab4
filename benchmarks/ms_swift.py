"""Context distillation in whole training runs beside ms-swift's GKD with `teacher_prompt`, each in its own loop.

ms-swift's pins exclude ours, so that it runs in a process of an environment of its own (envs/ms_swift.txt), which stays
alive between rounds: `ms_swift_worker`. Its loss is KL(teacher || student) over the softmax of the teacher's K largest
logits alone, plus `sft_alpha` times the cross entropy; the study has the mean squared difference of the same K logits
in its place. Here ours computes ms-swift's, from the study's own cache and in the one training loop. Neither side's
imports and first loading of the model count. Ours builds its cache, loading the teacher for it, and writes curves,
a checkpoint and a resumable state for each condition; ms-swift writes nothing. One step an epoch takes all examples, so
that their order does not matter and every loss of a run can be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.context_distillation import (
    EPOCHS,
    LONGEST,
    WEIGHTS,
    built_cache,
    context,
    data_directory,
    problems,
    study_floor,
)
from benchmarks.harness import Aim, Benchmark, Form, Outcome, Work
from benchmarks.scale import Scale, model_directory, student
from stillhouse.config.training import ScheduleSettings, TrainingSettings
from stillhouse.data.packing import AnswerBatch, answer_rows_logits
from stillhouse.data.prompts import prompt_renderer
from stillhouse.data.records import read_problems
from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_json
from stillhouse.studies.context_distillation.data import shot_sampler
from stillhouse.studies.context_distillation.teacher import CachedTeacher, TargetSource
from stillhouse.training.loop import train
from stillhouse.training.objective import LossTerms

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = "resources/environments/ms_swift"
BUILD = f"python -m stillhouse.assets.environment requirements=envs/ms_swift.txt output={ENVIRONMENT}"
WORKER = Path(__file__).with_name("ms_swift_worker.py")
# CE + weight * divergence is `weight` times divergence + alpha * CE, and ms-swift has no weight for the divergence.
ALPHAS = tuple(1 / weight for weight in WEIGHTS)
# The gradients are compared: no norm reaches this one.
MAX_NORM, LEARNING_RATE, WEIGHT_DECAY = 1e6, 1e-4, 0.01


class TopKDivergence:
    """ms-swift's loss as an objective: KL(teacher || student) of the softmax over the teacher's top K, + alpha CE."""

    def __init__(self, teacher: TargetSource, alpha: float) -> None:
        self.teacher, self.alpha = teacher, alpha

    def __call__(self, model: nn.Module, micro_batch: AnswerBatch, step: int) -> LossTerms:
        """The sum over answer tokens."""
        logits = answer_rows_logits(model, micro_batch).float()
        targets = self.teacher.targets([sequence.example_id for sequence in micro_batch.sequences]).to(logits.device)
        assert targets.top_ids is not None and targets.top_logits is not None and targets.gold_logit is not None
        predicting = ~targets.gold_logit.isnan()
        ids, values = targets.top_ids[predicting].long(), targets.top_logits[predicting].float()
        learnt, taught = logits.gather(1, ids).log_softmax(-1), values.log_softmax(-1)
        divergence = functional.kl_div(learnt, taught, reduction="sum", log_target=True)
        cross_entropy = functional.cross_entropy(logits, micro_batch.labels, reduction="sum")
        return LossTerms(divergence + self.alpha * cross_entropy, micro_batch.answer_tokens)


def cached_runs(folder: Path, scale: Scale) -> Work:
    """Ours: the cache is built anew, then the training loop learns each condition from it."""
    model = student(model_directory(folder, scale), scale)
    data, _ = problems(folder, scale)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}
    settings = TrainingSettings(
        steps=EPOCHS,
        batch_size=len(data),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_gradient_norm=MAX_NORM,
        schedule=ScheduleSettings(kind="constant", warmup_steps=0),
        precision=scale.precision,
    )

    def work() -> Outcome:
        losses: list[float] = []
        gradients: dict[str, torch.Tensor] = {}

        def note_gradients(*_: Any) -> None:
            if not gradients:
                gradients.update(
                    {name: value.grad.clone() for name, value in trained.items() if value.grad is not None}
                )

        with tempfile.TemporaryDirectory(dir=folder) as place:
            cache = built_cache(folder, scale, Path(place) / "cache")
            teacher = CachedTeacher(cache, model, "top_k", scale.top_k)
            hook = register_optimizer_step_pre_hook(note_gradients)
            for alpha in ALPHAS:
                gradients.clear()
                with torch.no_grad():
                    for name, value in trained.items():
                        value.copy_(start[name])
                output = Path(place) / f"run-{alpha}"
                output.mkdir()
                objective = TopKDivergence(teacher, alpha)
                train(model, objective, data, settings, work_dir=output / "work", output_dir=output, seed=0)
                losses += [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
            hook.remove()
        return {"loss": torch.tensor(losses), **gradients}

    return work


def ms_swift_runs(checkpointing: bool, folder: Path, scale: Scale) -> Work:
    """The same conditions in ms-swift; `checkpointing` of activations is its default."""
    place = Path(tempfile.mkdtemp(prefix="ms-swift-", dir=folder))
    command = (sys.executable, "-P", str(WORKER))
    return Worker(place, arguments(place, folder, scale, checkpointing), command, packages()).outcome


def arguments(place: Path, folder: Path, scale: Scale, checkpointing: bool) -> dict[str, Any]:
    """The worker's settings, their adapter and data set among them: what differs from its defaults, for equality."""
    model = model_directory(folder, scale)
    student(model, scale).save_pretrained(place / "adapter")
    rows = dataset(folder, scale)
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "rlhf_type": "gkd",
        "model": str(model),
        # The same model under a LoRA: the adapter is switched off for it.
        "teacher_model": str(model),
        "model_type": "qwen3",
        # No hub is asked whether the files are the newest.
        "check_model": False,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[scale.precision],
        "adapters": [str(place / "adapter")],
        # The prompts are rendered already.
        "template": "dummy",
        "dataset": [str(place / "train.jsonl")],
        "split_dataset_ratio": 0.0,
        "max_length": LONGEST,
        # Never on sampled answers; forward KL over K at temperature 1.
        "lmbda": 0.0,
        "beta": 0.0,
        "temperature": 1.0,
        "gkd_logits_topk": scale.top_k,
        "sft_alphas": ALPHAS,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": len(rows),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta2": 0.999,
        "max_grad_norm": MAX_NORM,
        # Nothing but the steps: no processes that load three batches, no checkpoints, no curves.
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "report_to": ["none"],
        "output_dir": str(place / "output"),
        "add_version": False,
    }


def dataset(folder: Path, scale: Scale) -> list[dict[str, Any]]:
    """ms-swift's columns: the student's prompt, the answer, and the prompt with shots for the teacher."""
    found = read_problems(data_directory(folder, scale) / "train.jsonl")
    renderer = prompt_renderer(load_tokenizer(model_directory(folder, scale)))
    sampler = shot_sampler(found, context(scale))
    return [
        {
            "messages": [
                {"role": "user", "content": renderer.text(problem.question)},
                {"role": "assistant", "content": problem.answer},
            ],
            "teacher_prompt": renderer.text(problem.question, sampler.draw(index)),
        }
        for index, problem in enumerate(found)
    ]


def packages() -> Path:
    """What ms-swift needs over our packages. Raises `UserError`, with the command that installs it, where it is not."""
    folder = REPOSITORY / ENVIRONMENT
    if not folder.exists():
        raise UserError(f"{ENVIRONMENT} is missing, the packages of ms-swift; to install them: {BUILD}")
    return folder


class Worker:
    """A process with other packages that trains when asked; it ends with this object.

    command: starts it, but for its argument. place: where its settings, its log and what it trained lie. packages:
    what it imports before ours.
    """

    def __init__(self, place: Path, settings: Mapping[str, Any], command: tuple[str, ...], packages: Path) -> None:
        self.place, self.log = place, place / "worker.log"
        write_json(place / "settings.json", settings)
        # Nothing is looked for outside, and nothing left in the user's caches.
        own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place), "MODELSCOPE_CACHE": str(place)}
        environment = {**os.environ, **own, "PYTHONPATH": str(packages)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(place / "settings.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        weakref.finalize(self, finish, self.process)
        self.answer()

    def outcome(self) -> Outcome:
        """Train every condition once more."""
        path = self.place / "outcome.safetensors"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"outcome": str(path)}) + "\n")
        self.process.stdin.flush()
        self.answer()
        return load_file(path)

    def answer(self) -> dict[str, Any]:
        """The next line. Raises `UserError` with the worker's last words where it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines() or ["nothing"]
            raise UserError(f"the worker of ms-swift ended with {self.process.wait()}, and said: {said[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def finish(process: subprocess.Popen[str]) -> None:
    """Let a worker end: its input is over."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.wait()
    process.stdout.close()


MS_SWIFT = Benchmark(
    name="ms_swift",
    what=f"context distillation, {EPOCHS} epochs x {len(WEIGHTS)} conditions in each tool's own training loop, cache "
    "build included",
    forms=(
        Form("ms-swift GKD, teacher_prompt", "tool", partial(ms_swift_runs, True), counted=False),
        Form("ms-swift GKD without checkpointing", "tool", partial(ms_swift_runs, False), counted=False),
        Form("cached targets, ms-swift's loss", "ours", cached_runs, counted=False),
    ),
    aims=(
        Aim("ms-swift GKD, teacher_prompt", "time", 2),
        Aim("ms-swift GKD without checkpointing", "time", 2),
    ),
    floor=study_floor,
    floor_formula="forward(teacher tokens, answer rows) + steps x 2 x forward(student tokens, answer rows)",
    remains="Both compute ms-swift's loss, KL over the softmax of the teacher's K largest logits alone; the study has "
    "the squared difference of those logits in its place. Left: loading the teacher and writing the cache, once; "
    "curves, a checkpoint and a resumable state for every condition, which has three steps; then the step's own.",
    # One step an epoch takes every example that the cache holds. A round is fifteen steps of every form.
    change=lambda scale: replace(
        scale, layers=max(1, scale.layers // 2), batch=scale.shots + 1, rounds=min(3, scale.rounds)
    ),
)
