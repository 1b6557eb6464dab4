"""Step program: train one student, or the task's LoRA teacher, and keep its checkpoints.

The condition's settings decide what is distilled; the loop is the shared one. Resumable state lies in
`work/<fingerprint>/`, and the output directory appears whole when the last step is done.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.data.prompts import PromptRenderer, prompt_renderer
from stillhouse.data.records import Problem, read_problems
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.lora import load_trainable
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import verify_manifest, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.runtime.seeds import seed_everything
from stillhouse.studies.context_distillation.data import student_data, teacher_examples
from stillhouse.studies.context_distillation.objective import ContextDistillationObjective
from stillhouse.studies.context_distillation.run_settings import RunSettings
from stillhouse.studies.context_distillation.teacher import CachedTeacher, OnlineTeacher
from stillhouse.training.loop import train
from stillhouse.training.processes import process_state, staged_output

MODULE = "stillhouse.studies.context_distillation.train"
PATHS = {"model", "data", "cache", "output", "work"}


class TrainStep(StrictModel):
    """The step's command line."""

    model: Path
    data: Path
    cache: Path | None = None
    output: Path
    work: Path
    condition: str
    seed: int
    run: RunSettings
    tracking: TrackingSettings
    trust_remote_code: bool


def main(step: TrainStep) -> None:
    """Train from the newest state of this very run, and put the checkpoints into place."""
    inputs = {"model": step.model, "data": step.data} | ({"cache": step.cache} if step.cache else {})
    for path in inputs.values():
        verify_manifest(path)
    precision = resolve_precision(step.run.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    if process_state().is_main_process:
        log_to_file(work_dir)
    seed = step.seed + step.run.seed_offset
    settings = step.run.training
    with RunRecord(MODULE, step, inputs) as record:
        seed_everything(seed)
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        renderer = prompt_renderer(tokenizer, step.run.prompt_format)
        model = load_trainable(step.model, settings, seed, trust_remote_code=step.trust_remote_code)
        problems = read_problems(step.data / "train.jsonl")[: step.run.train_examples]
        teacher, untaught = teacher_of(step, model, renderer, problems)
        data = student_data(
            problems,
            renderer,
            step.run.teacher.context,
            step.run.max_length,
            step.run.overlong,
            untaught=untaught,
            packing=settings.packing,
            positions=step.run.distillation.positions,
        )
        logger.info("%s: %d examples, %d steps of %d", step.condition, len(data), settings.steps, settings.batch_size)
        objective = ContextDistillationObjective(step.run.distillation, settings.steps, seed, teacher)
        with staged_output(step.output) as staging:
            result = train(
                model,
                objective,
                data,
                settings,
                work_dir=work_dir,
                output_dir=staging,
                seed=seed,
                tokenizer=tokenizer,
                tracking=step.tracking,
                run_name=f"{step.condition}-seed-{step.seed}",
            )
            if process_state().is_main_process:
                record.add(training=asdict(result), examples=len(data), skipped=asdict(data.skipped), untaught=untaught)
                write_manifest(staging)
                record.write(staging / "run.json")


def teacher_of(
    step: TrainStep, model: nn.Module, renderer: PromptRenderer, problems: list[Problem]
) -> tuple[CachedTeacher | OnlineTeacher | None, tuple[str, ...]]:
    """The source of the teacher's targets, None for a baseline, and the ids of examples that it has none for."""
    run = step.run
    mode = run.cache_mode
    if mode == "none":
        return None, ()
    if step.cache is not None:
        cached = CachedTeacher(step.cache, model, mode, run.distillation.top_k)
        return cached, cached.cache.facts.skipped
    examples = teacher_examples(problems, renderer, run.teacher.context, run.teacher.max_length, run.overlong)
    online = OnlineTeacher(model, examples, mode, run.teacher.cache_top_k, run.teacher.batch_tokens)
    return online, tuple(identity for identity, _ in examples.skipped.examples)


if __name__ == "__main__":
    run_step(TrainStep, main)
