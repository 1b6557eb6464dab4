"""Evaluation of several checkpoints under two protocols: one engine for all of them, started once.

The naive form starts the engine for each checkpoint; `transformers generate` loads model and adapter for
each checkpoint and answers padded batches, as most evaluation scripts do. Zero-shot prompts, and the same questions
after one fixed context. The start is part of the work. Which engine it is depends on what is installed: vLLM, else
transformers.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, adapted, model_directory, random_ids
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine
from stillhouse.models.loading import load_model
from stillhouse.runtime.files import staged_directory, write_manifest


def adapters(folder: Path, scale: Scale) -> list[Path]:
    """The checkpoints, as training leaves them."""
    model = model_directory(folder, scale)
    directory = folder / f"checkpoints-{model.name}-{scale.rank}-{scale.checkpoints}"
    if not directory.exists():
        with staged_directory(directory) as staging:
            student = adapted(load_model(model, "fp32", "cpu"), scale.rank)
            for number in range(scale.checkpoints):
                with torch.no_grad():
                    for name, parameter in student.named_parameters():
                        if "lora_B" in name:
                            parameter.mul_(1.5)
                student.save_pretrained(staging / f"checkpoint-{number}")
            write_manifest(staging)
    return sorted(directory.glob("checkpoint-*"))


def protocols(scale: Scale) -> list[list[list[int]]]:
    """Prompts as token ids: of each question alone, and after the fixed context."""
    questions = [random_ids(scale.prompt, scale, seed) for seed in range(scale.questions)]
    shots = random_ids(scale.shots * (scale.prompt + scale.answer), scale, scale.questions)
    return [questions, [shots + question for question in questions]]


def engine_settings(scale: Scale) -> EngineSettings:
    """The installed engine in the scale's precision."""
    return EngineSettings(precision=scale.precision, kv_cache_gib=0.5)


def outcome(answers: list[tuple[int, ...]]) -> Outcome:
    """The answers' tokens as one vector."""
    return {"tokens": torch.tensor([token for answer in answers for token in answer])}


def answered(checkpoint: Path, prompts: list[list[int]], scale: Scale, engine: object) -> list[tuple[int, ...]]:
    """Greedy answers of one checkpoint under one protocol."""
    settings = GenerationSettings(max_new_tokens=scale.generated)
    return [done.token_ids for done in engine.generate(prompts, settings, checkpoint)]  # type: ignore[attr-defined]


def start_for_each(folder: Path, scale: Scale) -> Work:
    """An engine for each checkpoint."""
    model, found = model_directory(folder, scale), adapters(folder, scale)

    def work() -> Outcome:
        answers = []
        for checkpoint in found:
            with closing(open_engine(model, engine_settings(scale), [checkpoint])) as engine:
                for prompts in protocols(scale):
                    answers += answered(checkpoint, prompts, scale, engine)
        return outcome(answers)

    return work


def one_start(folder: Path, scale: Scale) -> Work:
    """Ours."""
    model, found = model_directory(folder, scale), adapters(folder, scale)

    def work() -> Outcome:
        answers = []
        with closing(open_engine(model, engine_settings(scale), found)) as engine:
            for checkpoint in found:
                for prompts in protocols(scale):
                    answers += answered(checkpoint, prompts, scale, engine)
        return outcome(answers)

    return work


def transformers_generate(folder: Path, scale: Scale) -> Work:
    """Model and adapter loaded for each checkpoint; prompts of one length need no padding."""
    model_dir, found = model_directory(folder, scale), adapters(folder, scale)

    @torch.no_grad()
    def work() -> Outcome:
        answers: list[tuple[int, ...]] = []
        for checkpoint in found:
            model = PeftModel.from_pretrained(load_model(model_dir, scale.precision), str(checkpoint)).eval()
            for prompts in protocols(scale):
                ids = torch.tensor(prompts, device=model.device)
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=scale.generated,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                answers += [tuple(row) for row in made[:, ids.shape[1] :].tolist()]
        return outcome(answers)

    return work


def floor(folder: Path, scale: Scale) -> Floor:
    """The fixed context once a checkpoint, questions and answers under both protocols, all weights for each token."""
    shots = scale.shots * (scale.prompt + scale.answer)
    own = scale.questions * (scale.prompt + scale.generated)
    pairs = shots**2 / 2 + own * shots
    one = scale.operations(shots + 2 * own, pairs, 2 * scale.questions * scale.generated)
    read = scale.checkpoints * 2 * scale.generated * scale.weight_bytes
    return Floor(scale.checkpoints * one, read, scale.checkpoints * 2 * scale.questions * scale.generated)


CHECKPOINTS = Benchmark(
    name="evaluation",
    what="evaluation of 5 checkpoints x 2 protocols",
    forms=(
        Form("an engine start per checkpoint", "naive", start_for_each, counted=False),
        Form("transformers generate", "tool", transformers_generate, counted=False),
        Form("one engine start", "ours", one_start, counted=False),
    ),
    aims=(
        Aim(
            "an engine start per checkpoint",
            "time",
            3,
            cause="Ours has one start left beside the same answers.",
            series="checkpoints",
        ),
        Aim(
            "transformers generate",
            "time",
            3,
            cause="Ours has a start to earn back. What an engine saves beside batches of equal length is the fixed "
            "context, read once a checkpoint; at this width a step's small calls cost as much as its products.",
            series="checkpoints",
        ),
    ),
    floor=floor,
    floor_formula="checkpoints x (forward(shots once, questions and answers) ; weights read once per decoding step)",
    remains="The engine's start, a second or more whatever the work.",
    # A round is five starts of the naive form alone.
    change=lambda scale: replace(scale, rounds=min(3, scale.rounds)),
    # Two at least: with a single one ours would be the naive form. Short answers: the longer one is, the likelier two
    # tokens are as good as equal to random weights, and rounding chooses between them.
    checked=lambda scale: replace(
        scale, checkpoints=2, questions=min(8, scale.questions), generated=min(8, scale.generated)
    ),
)
