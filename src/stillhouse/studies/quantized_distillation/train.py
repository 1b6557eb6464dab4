"""Step program: train one student and keep its adapters.

The loop is the shared one; this program gives it a fake-quantised model with a LoRA, and the objective. Resumable
state lies in `work/<fingerprint>/`, and the output directory appears whole when the last step is done: the adapters
`checkpoint-<step>/`, `metrics.jsonl` (rows of saved steps have validation_kl, validation_agreement and perplexity) and
`run.json` (`validation` has the same of the untrained student, and the teacher's perplexity).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.data.prompts import PromptRenderer, prompt_renderer
from stillhouse.data.records import read_passages
from stillhouse.evaluation.engines.checks import stop_token_ids
from stillhouse.evaluation.perplexity import sliding_windows, text_tokens
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.lora import load_trainable
from stillhouse.models.precision import resolve_precision
from stillhouse.models.quantized_lora import fake_quantized
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import read_json, verify_manifest, write_json, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.runtime.seeds import seed_everything
from stillhouse.studies.quantized_distillation.batches import StudentData
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.objective import CachedTeacher, GkdObjective
from stillhouse.studies.quantized_distillation.run_settings import RunSettings
from stillhouse.studies.quantized_distillation.validation import Validation
from stillhouse.training.loop import train
from stillhouse.training.processes import process_state, staged_output

MODULE = "stillhouse.studies.quantized_distillation.train"
PATHS = {"model", "data", "cache", "text", "output", "work"}


class TrainStep(StrictModel):
    """The step's command line. text: the data set (a directory of splits) whose perplexity is followed."""

    model: Path
    data: Path
    cache: Path | None = None
    text: Path
    output: Path
    work: Path
    condition: str
    seed: int
    run: RunSettings
    tracking: TrackingSettings
    trust_remote_code: bool


def main(step: TrainStep) -> None:
    """Train from the newest state of this very run, and put the checkpoints into place."""
    inputs = {"model": step.model, "data": step.data, "text": step.text} | ({"cache": step.cache} if step.cache else {})
    for path in inputs.values():
        verify_manifest(path)
    precision = resolve_precision(step.run.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    if process_state().is_main_process:
        log_to_file(work_dir)
    run, settings = step.run, step.run.training
    seed = step.seed + run.seed_offset
    with RunRecord(MODULE, step, inputs) as record:
        seed_everything(seed)
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        renderer = prompt_renderer(tokenizer, run.prompt_format)
        examples = read_instructions(
            step.data / "train.jsonl", renderer, run.max_length, run.response_room, run.train_examples
        )
        model = load_trainable(step.model, settings, seed, trust_remote_code=step.trust_remote_code)
        assert isinstance(model, PeftModel)
        student = fake_quantized(model, run.format, run.lora_quantisation)
        data = StudentData(
            examples.sequences,
            packing=settings.packing,
            sampled_tokens=run.sampling.max_new_tokens if run.samples else 0,
        )
        objective = GkdObjective(
            run.distillation,
            run.sampling,
            seed,
            stop_token_ids(step.model, tokenizer),
            CachedTeacher(step.cache, student) if step.cache else None,
            packing=settings.packing,
        )
        validation = validation_of(step, student, renderer)
        before = remembered(work_dir / "before.json", validation, student)
        logger.info("%s: %d examples, %d steps of %d", step.condition, len(data), settings.steps, settings.batch_size)
        with staged_output(step.output) as staging:
            result = train(
                student,
                objective,
                data,
                settings,
                work_dir=work_dir,
                output_dir=staging,
                seed=seed,
                tracking=step.tracking,
                run_name=f"{step.condition}-seed-{step.seed}",
                validate=validation,
            )
            if process_state().is_main_process:
                record.add(
                    training=asdict(result),
                    examples=len(data),
                    left_out=examples.left_out,
                    cut_answers=examples.cut,
                    validation={"before": before, "teacher": {"perplexity": validation.teacher_perplexity}},
                )
                write_manifest(staging)
                record.write(staging / "run.json")


def validation_of(step: TrainStep, student: PeftModel, renderer: PromptRenderer) -> Validation:
    """The measures that the run's settings describe, on the validation split and the text."""
    run, settings = step.run, step.run.validation
    answers = read_instructions(
        step.data / "validation.jsonl", renderer, run.max_length, run.response_room, settings.items
    )
    passages = read_passages(step.text / f"{settings.text_split}.jsonl")
    ids = text_tokens(renderer.tokenizer, (passage.text for passage in passages), settings.text_tokens)
    windows = sliding_windows(ids, settings.window, settings.stride)
    return Validation(student, answers.sequences, windows, settings.batch_tokens)


def remembered(path: Path, validation: Validation, student: PeftModel) -> Any:
    """The untrained student's measures, computed in the run's first attempt alone."""
    if process_state().is_main_process and not path.is_file():
        write_json(path, dict(validation(student, 0)))
    process_state().wait_for_everyone()
    return read_json(path)


if __name__ == "__main__":
    run_step(TrainStep, main)
