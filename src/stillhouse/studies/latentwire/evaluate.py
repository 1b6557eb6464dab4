"""Step program: score every arm and every channel of a pair of readers, and keep the real wire files.

Checkpoints are chosen on validation; the test split then sees the chosen ones alone. Z goes through its bytes: what
a reader gets is unpacked from the message that is kept. Each subject's rows lie in `work` under a key of what
determines them, so that a new channel or a stopped job computes only what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.reading_comprehension import squad_version
from stillhouse.evaluation.results_files import Selection, write_part, write_results
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.files import (
    recorded_digests,
    staged_directory,
    verify_manifest,
    write_manifest,
)
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest
from stillhouse.studies.latentwire.arms import BYTE_BUDGET, REPLAY, TOKEN_BUDGET
from stillhouse.studies.latentwire.combine import agreement_rows, oracle_rows
from stillhouse.studies.latentwire.config import AnswerGenerationSettings, EvaluationSettings
from stillhouse.studies.latentwire.data import read_examples
from stillhouse.studies.latentwire.laboratory import ChannelRun, Laboratory
from stillhouse.studies.latentwire.results import (
    AGREEMENT,
    COMBINED,
    ITEM_COLUMNS,
    JOINT,
    SUBJECT_COLUMNS,
    ChannelFacts,
    PairResults,
    ReaderFacts,
    Split,
    Subject,
    measure,
    select_checkpoints,
)
from stillhouse.studies.latentwire.wire import WireFormat, message_bytes, read_message

MODULE = "stillhouse.studies.latentwire.evaluate"


class EvaluateStep(StrictModel):
    """The step's command line; models, model_names, model_notes and trust_remote_code are in the pair's order."""

    models: tuple[Path, ...]
    data: Path
    channels: tuple[Path, ...]
    encoders: tuple[Path, ...] = ()
    results: Path
    item_scores: Path
    record: Path
    wire: Path
    work: Path
    pair: str
    model_names: tuple[str, ...]
    model_notes: tuple[str, ...]
    trust_remote_code: tuple[bool, ...]
    dataset: str
    dataset_note: str
    max_text_bytes: int | None
    evaluation: EvaluationSettings


def main(step: EvaluateStep) -> None:
    """Score all subjects and write results.json, items.parquet, run.json and the wire files."""
    inputs = {str(path): path for path in (*step.models, step.data, *step.channels, *step.encoders)}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        job = EvaluationJob(step)
        candidates = job.score(job.candidates(), job.candidate_split)
        selections = select_checkpoints(measure(candidates), step.evaluation.selection)
        chosen = job.chosen(selections)
        rows = pd.concat([job.score(chosen, "test"), candidates], ignore_index=True)
        # A checkpoint that was chosen on the test split has its rows in both; the first are complete.
        items = rows.drop_duplicates([*SUBJECT_COLUMNS, "split", "item_id"]).assign(pair=step.pair)
        job.write_messages(step.wire, chosen)
        results = PairResults(
            pair=step.pair,
            readers=job.reader_facts(),
            dataset=step.dataset,
            dataset_note=step.dataset_note,
            squad_version=job.lab.version,
            left_out={split: questions.left_out for split, questions in job.questions.items()},
            evaluation=step.evaluation.model_dump(mode="json"),
            condition=step.evaluation.condition,
            wire=step.evaluation.wire.headline,
            channels=job.channel_facts(selections),
            selections=tuple(selections),
            measurements=tuple(measure(items)),
        )
        write_results(results, step.results, items, ITEM_COLUMNS, step.item_scores)
        record.add(subjects=len(results.measurements), parts_computed=job.computed, parts_kept=job.kept)
        record.write(step.record)


class EvaluationJob:
    """The evaluation of one pair: what is scored, and the parts of it that earlier attempts left."""

    def __init__(self, step: EvaluateStep) -> None:
        self.step, self.settings = step, step.evaluation
        limits = {"validation": self.settings.validation_items, "test": self.settings.test_items}
        self.questions = {
            split: read_examples(step.data / f"{split}.jsonl", limit, step.max_text_bytes)
            for split, limit in limits.items()
        }
        read = [ChannelRun.read(path, step.encoders) for path in step.channels]
        self.runs = {run.key: run for run in read}
        self.headline = [run for run in read if run.condition == self.settings.condition]
        self.candidate_split: Split = "test" if self.settings.selection == "best_on_test" else "validation"
        models = dict(zip(step.model_names, zip(step.models, step.trust_remote_code, strict=True), strict=True))
        self.chat_readers = {
            name for name, (path, trusted) in models.items() if load_tokenizer(path, trusted).chat_template
        }
        answers = [example.answers for questions in self.questions.values() for example in questions.examples]
        neutral = self.headline[0].run.reader
        self.lab = Laboratory(models, neutral, self.settings.batch_size, squad_version(answers))
        self.computed = self.kept = 0
        self.messages = cache(self._messages)
        self._outputs: dict[Subject, list[str]] = {}
        self._facts = {
            "code": code_digests(MODULE),
            "data": data_digest(step.data),
            "models": {name: data_digest(path) for name, (path, _) in models.items()},
            "precision": resolve_precision(neutral.precision),
            "neutral": self.lab.neutral.model_dump(mode="json"),
            "items": [*limits.values(), step.max_text_bytes],
            "version": self.lab.version,
        }

    def candidates(self) -> list[Subject]:
        """Every checkpoint that may be chosen, through the headline's wire format."""
        wanted = self.settings.steps
        return [
            Subject("latent", reader, run.condition, run.seed, step, self.settings.wire.headline)
            for run in self.runs.values()
            for step in run.checkpoints
            if wanted is None or step in wanted
            for reader in self.step.model_names
        ]

    def chosen(self, selections: Sequence[Selection]) -> list[Subject]:
        """Everything that the test split is for, in the order in which it is computed."""
        arms, readers = self.settings.arms, self.step.model_names
        latents = [
            Subject("latent", reader, one.condition, one.seed, one.step, wire)
            for one in selections
            for wire in self.settings.wire.formats
            for reader in readers
            if "latent" in arms
        ]
        first = next(one for one in selections if one.condition == self.settings.condition)
        trained = {name: getattr(first, name) for name in ("condition", "seed", "step")}
        replays = [
            Subject(arm, reader, **(trained if arm == "replay_adapter" else {}))
            for arm in reversed(REPLAY)  # the one that needs a channel follows the channels
            for reader in readers
            if arm in arms
        ]
        texts = list(self._texts())
        bases = [one for one in latents if (one.condition, one.wire) == (first.condition, self.settings.wire.headline)]
        bases += [one for one in texts if one.arm == "full_text"]
        combined = [
            replace(base, reader=kind)
            for base in bases
            if base.reader == readers[0]
            for kind in COMBINED
            if kind in arms
        ]
        return [*latents, *replays, *texts, *combined]

    def _texts(self) -> Iterator[Subject]:
        """The text arms at each of their budgets."""
        arms, runs, wire = self.settings.arms, self.runs.values(), self.settings.wire
        tokens = {run.run.latent.per_model(len(self.step.models)) for run in runs}
        formats = wire.formats if self.settings.byte_budgets is None else (wire.headline,)
        sizes = {
            message_bytes(run.run.latent.length, run.run.latent.dimension, WireFormat(kind, wire.group_size))
            for run in runs
            for kind in formats
        }
        sizes |= set(self.settings.byte_budgets or ())
        budgets = dict.fromkeys(TOKEN_BUDGET, tokens) | dict.fromkeys(BYTE_BUDGET, sizes)
        for arm in (arm for arm in arms if arm in ("full_text", "no_context", *budgets)):
            for reader in self.step.model_names:
                # Without a template there is no chat prompt to cut.
                if arm != "token_budget_chat_full" or reader in self.chat_readers:
                    yield from (Subject(arm, reader, budget=budget) for budget in sorted(budgets.get(arm, {0})))

    def score(self, subjects: Iterable[Subject], split: Split) -> pd.DataFrame:
        """The rows of these subjects on one split, computed where no earlier attempt left them."""
        generation = self.settings.generation
        needed = split == "test" or self.settings.selection == "f1"
        frames = []
        for subject in subjects:
            part = self._part(subject, split, generation if needed else None)
            if part.is_file():
                self.kept += 1
            else:
                logger.info("%s: %s", split, subject)
                write_part(self._rows(subject, split, generation if needed else None), part)
                self.computed += 1
            rows = pd.read_parquet(part)
            if "output" in rows:
                self._outputs[subject] = list(rows["output"])
            names = {name: getattr(subject, name) for name in SUBJECT_COLUMNS}
            frames.append(rows.assign(**names, split=split))
        return pd.concat(frames, ignore_index=True)

    def _rows(self, subject: Subject, split: Split, generation: AnswerGenerationSettings | None) -> pd.DataFrame:
        """One subject's rows, in the order of the split's examples."""
        examples = self.questions[split].examples
        run = self.runs.get((subject.condition, subject.seed))
        sent = self.messages(replace(subject, reader=""), split) if subject.wire else None
        if subject.reader in COMBINED:
            outputs = {name: self._outputs[replace(subject, reader=name)] for name in self.step.model_names}
            if subject.reader == JOINT:
                rows = self.lab.joint_rows(subject, outputs, run, sent, examples)
            elif subject.reader == AGREEMENT:
                rows = agreement_rows(examples, outputs)
            else:
                rows = oracle_rows(examples, outputs, self.lab.version)
        elif sent is not None and run is not None:
            rows = self.lab.latent_rows(subject, run, sent, examples, generation)
        elif subject.arm in REPLAY:
            rows = self.lab.replay_rows(subject, run, examples, generation)
        else:
            rows = self.lab.text_rows(subject, examples, generation)
        sizes = pd.DataFrame([(one.id, one.text_bytes) for one in examples], columns=["item_id", "text_bytes"])
        return sizes.merge(rows, on="item_id", validate="1:1")

    def _messages(self, subject: Subject, split: Split) -> pd.DataFrame:
        """What this channel sends in this format for each of the split's examples, as `Laboratory.messages` has it."""
        assert subject.wire
        part = self._part(subject, split, None, kind="messages")
        if not part.is_file():
            run = self.runs[subject.condition, subject.seed]
            wire = WireFormat(subject.wire, self.settings.wire.group_size)
            write_part(self.lab.messages(run, subject.step, wire, self.questions[split].examples), part)
        return pd.read_parquet(part)

    def write_messages(self, directory: Path, subjects: Iterable[Subject]) -> None:
        """One file a prompt of the test split, read back: `<condition>/seed_<seed>/<format>/<number>-<id>.lwir`."""
        sent = {replace(one, reader="") for one in subjects if one.wire}
        with staged_directory(directory) as staging:
            for subject in sorted(sent, key=lambda one: one.key):
                folder = staging / subject.condition / f"seed_{subject.seed}" / subject.wire
                folder.mkdir(parents=True)
                messages = self.messages(subject, "test")["message"]
                for number, (example, message) in enumerate(
                    zip(self.questions["test"].examples, messages, strict=True)
                ):
                    # The number keeps two ids apart that differ in what a file name cannot hold.
                    path = folder / f"{number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', example.id)}.lwir"
                    path.write_bytes(message)
                    read_message(path)
            write_manifest(staging)

    def channel_facts(self, selections: Sequence[Selection]) -> tuple[ChannelFacts, ...]:
        """Every channel's size, and what its encoder did to the test texts."""
        facts, wire = [], self.settings.wire.headline
        for one in selections:
            run = self.runs[one.condition, one.seed]
            sent = self.messages(Subject("latent", "", one.condition, one.seed, one.step, wire), "test")
            facts.append(
                ChannelFacts(
                    condition=run.condition,
                    seed=run.seed,
                    length=run.run.latent.length,
                    dimension=run.run.latent.dimension,
                    encoder=run.run.encoder.kind,
                    trained_parameters=run.trained_parameters,
                    cut_texts=int(sent["cut"].iloc[0]),
                )
            )
        return tuple(facts)

    def reader_facts(self) -> tuple[ReaderFacts, ...]:
        """The frozen models, and how they are given a text."""
        step, facts = self.step, []
        for name, note in zip(step.model_names, step.model_notes, strict=True):
            style = self.lab.neutral.text_prompt
            if style == "auto":
                style = "chat_full" if name in self.chat_readers else "content_only"
            facts.append(ReaderFacts(name=name, note=note, text_prompt=style))
        return tuple(facts)

    def _part(
        self, subject: Subject, split: Split, generation: AnswerGenerationSettings | None, kind: str = "rows"
    ) -> Path:
        """Where a subject's rows are kept: named by everything that determines them."""
        weights = {}
        if subject.condition:
            run = self.runs[subject.condition, subject.seed]
            weights = recorded_digests(run.checkpoints[subject.step]) | {"run": short_digest(run.run.leaves())}
        facts = {
            "kind": kind,
            "subject": subject.key,
            "split": split,
            "generation": generation.model_dump(mode="json") if generation else None,
            "group_size": self.settings.wire.group_size if subject.wire else None,
            "weights": weights,
        }
        return self.step.work / f"{short_digest({**self._facts, **facts}, 24)}.parquet"


if __name__ == "__main__":
    run_step(EvaluateStep, main)
