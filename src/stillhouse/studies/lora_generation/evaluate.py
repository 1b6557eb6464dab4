"""Step program: score generated adapters on held-out tasks and shards, beside all that could do as well for less.

Every arm of every case is scored on the test items of its task; adapters are compared with the case's teacher by delta
activations on the same probes, and by weights. Scores are kept in `work` under a key of what determines them, so that a
stopped job or a new condition computes only what is missing. The adapters that the arms make are left as peft folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.config.training import Precision
from stillhouse.evaluation.results_files import write_part, write_results
from stillhouse.models.lora_tensors import adapter_digest, read_adapter
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest
from stillhouse.studies.lora_generation.arms import Collection, Entry, from_collection, generated, given
from stillhouse.studies.lora_generation.closeness import Ruler, map_of
from stillhouse.studies.lora_generation.config import EvaluationSettings
from stillhouse.studies.lora_generation.data import read_items
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.few_prompts import few_prompt_entries
from stillhouse.studies.lora_generation.generator_settings import RunSettings, TextSettings
from stillhouse.studies.lora_generation.generators import load_generator
from stillhouse.studies.lora_generation.results import (
    ITEM_COLUMNS,
    OF_COLLECTION,
    ChosenGenerator,
    GeneratorFacts,
    Measurement,
    ModelResults,
    Subject,
    TaskFacts,
    measured,
)
from stillhouse.studies.lora_generation.scoring import Scorer
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings, Style, TeacherTrainingSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from stillhouse.training.tracking import METRICS_FILE, read_metrics

MODULE = "stillhouse.studies.lora_generation.evaluate"
VALIDATION_LOSS = "validation/loss"
# What of the settings a score depends on.
READ = {"test_items", "score", "engine", "generation"}


class EvaluateStep(StrictModel):
    """The step's command line; data, tasks, datasets, dataset_notes and styles are in the order of the tasks."""

    model: Path
    encoder: Path
    data: tuple[Path, ...]
    adapters: Path
    deltas: Path
    generators: tuple[Path, ...]
    results: Path
    item_scores: Path
    made: Path
    record: Path
    work: Path
    model_name: str
    model_note: str
    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    dataset_notes: tuple[str, ...]
    styles: tuple[Style, ...]
    shards: ShardSettings
    text: TextSettings
    precision: Precision
    evaluation: EvaluationSettings
    few_prompt_training: TeacherTrainingSettings
    loss_tokens: str
    trust_remote_code: bool = False


def main(step: EvaluateStep) -> None:
    """Make the arms' adapters, score everything, and write results.json, items.parquet and run.json."""
    directories = (step.model, step.encoder, *step.data, step.adapters, step.deltas, *step.generators)
    inputs = {str(path): path for path in directories}
    with RunRecord(MODULE, step, inputs) as record, staged_directory(step.made) as made:
        for path in inputs.values():
            verify_manifest(path)
        job = EvaluationJob(step, made)
        with closing(job.scorer):
            entries = job.entries()
            rows = [job.rows(entry) for entry in entries]
        items = pd.concat(rows, ignore_index=True).assign(model=step.model_name)
        cache = DeltaCache.load(step.deltas)
        clusters, points = map_of(job.collection.rows, step.adapters, cache)
        results = ModelResults(
            model=step.model_name,
            model_note=step.model_note,
            evaluation=step.evaluation.model_dump(mode="json"),
            condition=step.evaluation.condition,
            flagged=step.shards.flagged,
            loss_tokens=step.loss_tokens,
            probes=cache.probes.kind,
            probe_texts=len(cache.probes.texts),
            tasks=tuple(job.task_facts()),
            adapters=tuple(job.collection.rows),
            points=tuple(points),
            clusters=clusters,
            generators=tuple(job.generator_facts()),
            selections=tuple(job.selections.values()),
            measurements=tuple(job.measurements(entries, rows, cache)),
        )
        write_results(results, step.results, items, ITEM_COLUMNS, step.item_scores)
        write_manifest(made)
        record.add(subjects=len(entries), parts_computed=job.computed, parts_kept=job.kept)
        record.write(step.record)


class EvaluationJob:
    """The evaluation of one base model: its cases and arms, and the scores that earlier attempts left."""

    def __init__(self, step: EvaluateStep, made: Path) -> None:
        self.step, self.settings = step, step.evaluation
        self.runs = {path: RunSettings.model_validate(_record(path)["settings"]["run"]) for path in step.generators}
        self.selections = {path: select_checkpoint(path, step.evaluation.selection) for path in step.generators}
        headline = next(p for p in step.generators if self.selections[p].condition == self.settings.condition)
        encoder = PromptEncoder(step.encoder, step.text, step.work / "embeddings")
        encoder.embed_anew(["The encoder is loaded before anything is timed."])
        self.collection = Collection(
            step.adapters,
            made,
            step.model_name,
            step.shards,
            encoder,
            self.runs[headline].generator.prompts,
            self.settings.seed,
        )
        self.styles = dict(zip(step.tasks, step.styles, strict=True))
        self.items = {
            task: read_items(data / "test.jsonl", self.styles[task], self.settings.test_items)
            for task, data in zip(step.tasks, step.data, strict=True)
        }
        self.scorer = Scorer(
            step.model,
            precision=step.precision,
            batch_tokens=self.settings.batch_tokens,
            score=self.settings.score,
            engine=self.settings.engine,
            generation=self.settings.generation,
            trust_remote_code=step.trust_remote_code,
        )
        self.computed = self.kept = 0
        self._facts = {
            "code": code_digests(MODULE),
            "model": data_digest(step.model),
            "data": [data_digest(path) for path in step.data],
            "precision": [resolve_precision(chosen) for chosen in (step.precision, self.settings.engine.precision)],
            "settings": [self.settings.model_dump(mode="json", include=READ), step.trust_remote_code],
        }

    def entries(self) -> list[Entry]:
        """Every subject, with the adapter or the context that it is scored under."""
        arms, cases = self.settings.arms, self.collection.cases
        entries = [Entry(Subject(task, "base")) for task in self.step.tasks if "base" in arms]
        for case in cases:
            offered = given(self.collection, case, self.settings.in_context_examples)
            entries += [entry for arm, entry in offered.items() if arm in arms]
        wanted = [arm for arm in OF_COLLECTION if arm in arms]
        for held_out in dict.fromkeys(run.held_out_tasks for run in self.runs.values()):
            entries += from_collection(self.collection, cases, held_out, wanted)
        if "generated" in arms:
            for path, chosen in self.selections.items():
                generator = load_generator(path / f"checkpoint-{chosen.step}")
                left_out = "+".join(self.runs[path].held_out_tasks)
                entries += generated(self.collection, cases, generator, chosen.condition, chosen.seed, left_out)
        if "few_prompt_lora" in arms:
            entries += few_prompt_entries(
                self.collection,
                cases,
                self.styles,
                self.scorer,
                self.step.few_prompt_training,
                self.step.loss_tokens,
                self.step.work,
            )
        self.scorer.served = [entry.folder for entry in entries if entry.folder and self._is_worked(entry)]
        return entries

    def rows(self, entry: Entry) -> pd.DataFrame:
        """The scores of one subject's items, from an earlier attempt where it left them."""
        task = entry.subject.task
        adapter = adapter_digest(read_adapter(entry.folder)) if entry.folder else None
        shots = [asdict(shot) for shot in entry.shots]
        part = self.step.work / f"{short_digest({**self._facts, 'task': task, 'of': [adapter, shots]}, 24)}.parquet"
        if part.is_file():
            self.kept += 1
        else:
            self.computed += 1
            logger.info("%s: %d items", entry.subject, len(self.items[task]))
            scores = self.scorer.score(self.styles[task], self.items[task], entry.folder, entry.shots)
            write_part(scores, part)
        return pd.read_parquet(part).assign(**asdict(entry.subject))

    def measurements(
        self, entries: Sequence[Entry], rows: Sequence[pd.DataFrame], cache: DeltaCache
    ) -> Iterator[Measurement]:
        """One measurement per subject, of its rows."""
        ruler = Ruler(self.step.model, cache, self.step.trust_remote_code)
        ruler.prepare([entry.folder for entry in entries if entry.folder])
        teachers = {(case.task, case.shard, case.seed): case.name for case in self.collection.cases}
        for entry, own in zip(entries, rows, strict=True):
            one = entry.subject
            accuracy, gold_nll = measured(own)
            held_out = tuple((one.held_out or "").split("+"))
            yield Measurement(
                **asdict(one),
                role=self.step.shards.role(one.task, one.shard, held_out) if one.shard is not None else None,
                accuracy=accuracy,
                gold_nll=gold_nll,
                closeness=(
                    ruler.closeness(entry.folder, self.step.adapters / teachers[one.task, one.shard, one.teacher_seed])
                    if entry.folder and one.shard is not None and one.teacher_seed is not None
                    else None
                ),
                seconds=entry.seconds,
                source=entry.source,
            )

    def task_facts(self) -> Iterator[TaskFacts]:
        """What the tables say of the tasks."""
        step = self.step
        for task, dataset, note in zip(step.tasks, step.datasets, step.dataset_notes, strict=True):
            style, items = self.styles[task], len(self.items[task])
            yield TaskFacts(task=task, dataset=dataset, dataset_note=note, style=style, items=items)

    def generator_facts(self) -> Iterator[GeneratorFacts]:
        """What the tables say of the conditions; seeds share them."""
        conditions = [chosen.condition for chosen in self.selections.values()]
        for path in (list(self.selections)[conditions.index(name)] for name in dict.fromkeys(conditions)):
            run, record = self.runs[path], _record(path)
            yield GeneratorFacts(
                condition=self.selections[path].condition,
                held_out="+".join(run.held_out_tasks),
                kind=run.generator.kind,
                weight=run.losses.weight,
                weight_kind=run.losses.weight_kind,
                delta=run.losses.delta,
                delta_kind=run.losses.delta_kind,
                norm=run.losses.norm,
                guided=run.losses.guided,
                prompts=run.generator.prompts,
                parameters=record["parameters"],
                adapters=len(record["adapters"]),
                start=run.generator.start,
                apart_from_losses=short_digest(run.model_dump(mode="json", exclude={"losses"})),
            )

    def _is_worked(self, entry: Entry) -> bool:
        return self.styles[entry.subject.task] == "worked"


def select_checkpoint(generator: Path, rule: str) -> ChosenGenerator:
    """The checkpoint that is scored: lowest loss on the validation shards (ties: the earlier), or the last."""
    settings = _record(generator)["settings"]
    steps = sorted(int(path.name.partition("-")[2]) for path in generator.glob("checkpoint-*"))
    chosen = steps[-1]
    rows = {int(row["step"]): row for row in read_metrics(generator / METRICS_FILE)}
    if rule == "validation_loss":
        if missing := [step for step in steps if VALIDATION_LOSS not in rows.get(step, {})]:
            raise UserError(
                f"{generator / METRICS_FILE}: has no {VALIDATION_LOSS} of step {missing[0]}: train it again"
            )
        chosen = min(steps, key=lambda step: (rows[step][VALIDATION_LOSS], step))
    return ChosenGenerator(
        condition=settings["condition"],
        seed=settings["seed"],
        step=chosen,
        validation_loss=rows.get(chosen, {}).get(VALIDATION_LOSS),
    )


def _record(generator: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(generator / "run.json")
    return record


if __name__ == "__main__":
    run_step(EvaluateStep, main)
