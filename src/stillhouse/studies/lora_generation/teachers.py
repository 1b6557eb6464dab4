"""Step program: train the adapters of some shards of one task together, and measure each before and after.

An adapter's folder holds `adapter_model.safetensors` and `adapter_config.json` (peft's), `prompts.json`, the examples
that stand for it, and `teacher.json`, what it is of and whether it is better than the base on its own task. Resumable
state lies in `work/<fingerprint>/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.config.training import TrackingSettings
from stillhouse.models.lora_tensors import write_adapter
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import link_or_copy, staged_directory, verify_manifest, write_json, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, data_digest, fingerprint
from stillhouse.runtime.seeds import derived_seed, seed_everything
from stillhouse.studies.lora_generation.data import Wording, read_items, shard_of, solved
from stillhouse.studies.lora_generation.manifest import FACTS_FILE, TeacherFacts
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, SolvedPrompt, write_prompts
from stillhouse.studies.lora_generation.results import measured
from stillhouse.studies.lora_generation.scoring import Scorer
from stillhouse.studies.lora_generation.teacher_settings import Style, Teacher, TeacherTrainingSettings
from stillhouse.training.adapter_batch import AdapterBatch, AdapterLosses, AdapterSequences, checkpoint_adapter
from stillhouse.training.loop import TrainingResult, train
from stillhouse.training.processes import process_state
from stillhouse.training.tracking import METRICS_FILE

MODULE = "stillhouse.studies.lora_generation.teachers"
PATHS = {"model", "data", "output", "work"}
TRAINED = "trained"  # what the shared loop leaves, in the work folder


class TeachersStep(StrictModel):
    """The step's command line: shards `first_shard` to `last_shard` of `task`; `steps` are collected."""

    model: Path
    data: Path
    output: Path
    work: Path
    model_name: str
    task: str
    style: Style
    seed: int
    first_shard: int
    last_shard: int
    shard_examples: int
    prompts: int
    steps: tuple[int, ...]
    loss_tokens: Literal["answer", "all"]
    shared_start: bool
    better_by: Literal["accuracy", "gold_nll"]
    scored_items: int | None
    score: Literal["acc", "acc_norm"]
    batch_tokens: int
    training: TeacherTrainingSettings
    engine: EngineSettings | None = None
    generation: GenerationSettings | None = None
    tracking: TrackingSettings
    trust_remote_code: bool = False

    @property
    def shards(self) -> range:
        """The shards whose adapters train together."""
        return range(self.first_shard, self.last_shard + 1)


def main(step: TeachersStep) -> None:
    """Train, collect the wanted steps as peft folders, and score them."""
    if process_state().num_processes > 1:
        raise UserError("teachers: each adapter's batch is counted by one process: start this step on one GPU")
    inputs = {"model": step.model, "data": step.data}
    for path in inputs.values():
        verify_manifest(path)
    precision = resolve_precision(step.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    log_to_file(work_dir)
    with RunRecord(MODULE, step, inputs) as record, staged_directory(step.output) as staging:
        seed_everything(step.seed)
        shards = [shard_of(step.data / "train.jsonl", step.style, n, step.shard_examples) for n in step.shards]
        examples = [[solved(item) for item in shard] for shard in shards]
        teachers = [Teacher(step.task, shard, step.seed, trained) for shard in step.shards for trained in step.steps]
        scorer = Scorer(
            step.model,
            precision=step.training.precision,
            batch_tokens=step.batch_tokens,
            score=step.score,
            engine=step.engine,
            generation=step.generation,
            served=[staging / teacher.folder for teacher in teachers],
            trust_remote_code=step.trust_remote_code,
        )
        with closing(scorer):
            batch = new_adapters(step, scorer.model)
            result = train_together(step, batch, scorer, examples, work_dir)
            for teacher in teachers:
                place, folder = step.shards.index(teacher.shard), staging / teacher.folder
                checkpoint = work_dir / TRAINED / f"checkpoint-{teacher.step}"
                write_adapter(checkpoint_adapter(checkpoint, batch.layout, place), folder, step.model_name)
                write_prompts(folder / PROMPTS_FILE, examples[place][: step.prompts])
            judged = judge(step, scorer, teachers, staging, result.seconds / len(shards))
        link_or_copy(work_dir / TRAINED / METRICS_FILE, staging / METRICS_FILE)
        shutil.copytree(work_dir / TRAINED / "tensorboard", staging / "tensorboard")
        record.add(training=asdict(result), adapters=len(judged), better=sum(one.better for one in judged))
        write_manifest(staging)
        record.write(staging / "run.json")


def new_adapters(step: TeachersStep, model: PreTrainedModel) -> AdapterBatch:
    """An adapter for each shard; with a shared start all begin at the same A, whatever their task, shard and seed."""
    own = [() if step.shared_start else (step.task, shard, step.seed) for shard in step.shards]
    return AdapterBatch(model, step.training.lora, [derived_seed(0, "start", *names) for names in own])


def train_together(
    step: TeachersStep,
    batch: AdapterBatch,
    scorer: Scorer,
    examples: Sequence[Sequence[SolvedPrompt]],
    work_dir: Path,
) -> TrainingResult:
    """Train the adapters of all shards in one process, each as if alone."""
    wording = Wording.of(scorer.model, scorer.tokenizer, step.style)
    sequences = [wording.learnt(own, step.loss_tokens) for own in examples]
    names = [f"shard_{shard}" for shard in step.shards]
    logger.info("%s: %d adapters, %d examples each, seed %d", step.task, len(names), len(sequences[0]), step.seed)
    return train(
        batch,
        AdapterLosses(names),
        AdapterSequences(sequences),
        step.training,
        work_dir=work_dir,
        output_dir=work_dir / TRAINED,
        seed=step.seed,
        groups=batch.groups(),
        clip_apart=True,
        tracking=step.tracking,
        run_name=f"{step.task}-{'-'.join(names)}-seed-{step.seed}",
    )


def judge(
    step: TeachersStep, scorer: Scorer, teachers: Sequence[Teacher], folder: Path, seconds: float
) -> list[TeacherFacts]:
    """Score base and adapters on the task's validation items, and leave each adapter's facts in its folder.

    `seconds` is an adapter's share of the training.
    """
    items = read_items(step.data / "validation.jsonl", step.style, step.scored_items)
    accuracy_before, nll_before = measured(scorer.score(step.style, items, None))
    judged = []
    for teacher in teachers:
        accuracy_after, nll_after = measured(scorer.score(step.style, items, folder / teacher.folder))
        gains = {
            "accuracy": accuracy_after.value - accuracy_before.value,
            "gold_nll": nll_before.value - nll_after.value,
        }
        facts = TeacherFacts(
            **asdict(teacher),
            examples=step.shard_examples,
            base_digest=data_digest(step.model),
            accuracy_before=accuracy_before,
            accuracy_after=accuracy_after,
            gold_nll_before=nll_before,
            gold_nll_after=nll_after,
            better_by=step.better_by,
            better=gains[step.better_by] > 0,
            seconds=seconds * teacher.step / step.training.steps,
        )
        write_json(folder / teacher.folder / FACTS_FILE, facts.model_dump(mode="json"))
        verdict = "better than" if facts.better else "NOT better than"
        logger.info("%s: %s the base by %s (%+.3f)", teacher.name, verdict, step.better_by, gains[step.better_by])
        judged.append(facts)
    return judged


if __name__ == "__main__":
    run_step(TeachersStep, main)
