"""Step program: score the teacher, the baselines and every student of one model, on tasks, texts and answers.

The weights are the converted ones; students of the first seeds are also measured before their conversion. A system's
rows on a set lie in `work` under a key of what determines them: a new condition, or a stopped job that is run again,
computes only what is missing, and a model is loaded only where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.harness import score_choices, task_versions
from stillhouse.evaluation.results_files import typed, write_part, write_results
from stillhouse.evaluation.teacher_agreement import teacher_states, token_scores
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.output_head import OutputHead, output_head, require_plain_head
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.files import verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest
from stillhouse.studies.quantized_distillation.evaluation_settings import AnswerRendering, EvaluationSettings
from stillhouse.studies.quantized_distillation.results import ITEM_COLUMNS, Kind, QuantizedResults, measure
from stillhouse.studies.quantized_distillation.sets import (
    MeasuredSet,
    TaskSet,
    TokenSet,
    answer_set,
    task_set,
    text_set,
)
from stillhouse.studies.quantized_distillation.systems import EvaluatedSystem, read_systems

MODULE = "stillhouse.studies.quantized_distillation.evaluate"


class EvaluateStep(StrictModel):
    """The step's command line.

    exported, exported_conditions, exported_seeds: one after another, in the same order. students: the trainings
    behind the exported students. datasets: of the tasks, then of the texts, in the settings' order.
    """

    model: Path
    data: Path
    exported: tuple[Path, ...] = ()
    students: tuple[Path, ...] = ()
    datasets: tuple[Path, ...]
    results: Path
    item_scores: Path
    record: Path
    work: Path
    model_name: str
    model_note: str
    trust_remote_code: bool
    dataset: str
    dataset_note: str
    set_notes: dict[str, str] = {}
    rendering: AnswerRendering
    exported_conditions: tuple[str, ...] = ()
    exported_seeds: tuple[int, ...] = ()
    not_run: dict[str, str] = {}
    evaluation: EvaluationSettings


def main(step: EvaluateStep) -> None:
    """Score everything and write results.json, items.parquet and run.json."""
    inputs = {str(path): path for path in (step.model, step.data, *step.exported, *step.students, *step.datasets)}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        job = EvaluationJob(step)
        items = pd.concat([job.rows(system) for system in job.systems()], ignore_index=True)
        results = QuantizedResults(
            model=step.model_name,
            model_note=step.model_note,
            dataset=step.dataset,
            dataset_note=step.dataset_note,
            set_notes=step.set_notes,
            conditions=tuple(dict.fromkeys(one.system.condition for one in job.deployed)),
            task_versions=job.versions,
            evaluation=step.evaluation.model_dump(mode="json"),
            not_run=step.not_run,
            systems=tuple(system.facts() for system in job.deployed),
            measurements=tuple(measure(items)),
        )
        write_results(results, step.results, items, ITEM_COLUMNS, step.item_scores)
        record.add(task_versions=job.versions, parts_computed=job.computed, parts_kept=job.kept)
        record.write(step.record)


class EvaluationJob:
    """The evaluation of one model: its systems, its sets, and the rows that earlier attempts left."""

    def __init__(self, step: EvaluateStep) -> None:
        self.step, self.settings = step, step.evaluation
        self.deployed = read_systems(
            step.model, step.exported, step.exported_conditions, step.exported_seeds, step.students
        )
        tasks, texts = self.settings.tasks, self.settings.texts
        paths = iter(step.datasets)
        self.tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        self.tasks = [task_set(name, task, next(paths), self.settings.item_seed) for name, task in tasks.items()]
        self.texts = [text_set(name, text, next(paths), self.tokenizer, self.settings) for name, text in texts.items()]
        self.answers = answer_set(step.data, step.rendering, self.tokenizer, self.settings.answers)
        self.versions = task_versions(list(tasks))
        self.computed = self.kept = 0
        self._determined_by = {
            "code": code_digests(MODULE),
            "model": data_digest(step.model),
            "precision": resolve_precision(self.settings.precision),
            "device": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu",
        }

    def systems(self) -> Iterator[EvaluatedSystem]:
        """All that are measured; the first seeds' students also before their conversion."""
        seeds = list(dict.fromkeys(one.system.seed for one in self.deployed if one.student))[: self.settings.gap_seeds]
        for one in self.deployed:
            yield one
            if one.student and one.system.seed in seeds:
                yield one.before_conversion("merged")
                yield one.before_conversion("beside")

    def rows(self, system: EvaluatedSystem) -> pd.DataFrame:
        """A system's rows on all of its sets, computed where no earlier attempt left them."""
        deployed = system.system.variant == "deployed"
        everything: list[MeasuredSet] = [*self.texts, self.answers, *self.tasks]
        sets = everything if deployed else everything[:1]
        parts = {(one.kind, one.name): self._part(system, one) for one in sets}
        missing = [one for one in sets if not parts[one.kind, one.name].is_file()]
        self.kept += len(sets) - len(missing)
        self.computed += len(missing)
        if missing:
            self._compute(system, missing, parts)
        names = vars(system.system)
        frames = [
            typed(pd.read_parquet(part).assign(**names, kind=kind, name=name), ITEM_COLUMNS)
            for (kind, name), part in parts.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def _compute(
        self, system: EvaluatedSystem, missing: list[MeasuredSet], parts: dict[tuple[Kind, str], Path]
    ) -> None:
        """Score one system on the sets that it lacks, each kept as soon as it is done."""
        step, settings = self.step, self.settings
        head, states = self._teacher if any(isinstance(one, TokenSet) for one in missing) else (None, {})
        with system.loaded(settings.precision, step.trust_remote_code) as model:
            for one in missing:
                logger.info("%s: %s %s", system.system, one.kind, one.name)
                if isinstance(one, TaskSet):
                    scores = score_choices(model, self.tokenizer, {one.name: one.questions}, settings.batch_size)
                    rows = one.rows(scores[one.name])
                else:
                    assert head
                    rows = one.rows(token_scores(model, one.sequences, states[one.name], head, settings.batch_tokens))
                write_part(rows, parts[one.kind, one.name])

    @cached_property
    def _teacher(self) -> tuple[OutputHead, dict[str, list[Tensor]]]:
        """The teacher's output embeddings, and its final hidden states on every text and answer, on the CPU."""
        step, settings = self.step, self.settings
        teacher: PreTrainedModel = load_model(step.model, settings.precision, trust_remote_code=step.trust_remote_code)
        require_plain_head(teacher)
        states = {
            one.name: [rows.cpu() for rows in teacher_states(teacher, one.sequences, settings.batch_tokens)]
            for one in (*self.texts, self.answers)
        }
        head = output_head(teacher)
        return OutputHead(head.weight.clone(), head.bias), states

    def _part(self, system: EvaluatedSystem, one: MeasuredSet) -> Path:
        """Where a system's rows on a set are kept: named by everything that determines them."""
        key = short_digest({**self._determined_by, "system": system.digest, "kind": one.kind, "set": one.facts}, 16)
        return self.step.work / f"{key}.parquet"


if __name__ == "__main__":
    run_step(EvaluateStep, main)
