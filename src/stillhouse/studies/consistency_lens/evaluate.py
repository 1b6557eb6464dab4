"""Step program: score every lens of a model on held-out documents, without Gumbel noise, beside all controls.

Every checkpoint is scored on validation, which chooses one; that one is scored on the evaluation's split with every
baseline, control and best-of-K. What was computed of one checkpoint is kept in `work` under a key of what determines
it, so that a stopped job or a further seed computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.evaluation.results_files import Selection, write_part, write_results
from stillhouse.models.activations import swapped
from stillhouse.models.loading import frozen, load_tokenizer
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    atomic_write_text,
    read_json,
    recorded_digests,
    staged_directory,
    verify_manifest,
    write_sealed_json,
)
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest
from stillhouse.studies.consistency_lens import controls
from stillhouse.studies.consistency_lens.config import EvaluationSettings
from stillhouse.studies.consistency_lens.data import CachedExamples, Example, draw_partners
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.parts import embedding_matrix
from stillhouse.studies.consistency_lens.results import (
    BEST_OF,
    ITEM_COLUMNS,
    LENS,
    MEAN,
    ZERO,
    LensFacts,
    ModelResults,
    measure,
    select_checkpoints,
)
from stillhouse.studies.consistency_lens.run_settings import RunSettings
from stillhouse.studies.consistency_lens.samples import (
    TABLE_COLUMNS,
    LensSamples,
    Prediction,
    Sample,
    SamplesFile,
    table_rows,
)
from stillhouse.studies.consistency_lens.scoring import (
    Variant,
    activations_of,
    best_of,
    explanations,
    kl_divergence,
    next_token_distributions,
    reconstructions,
    score,
)
from stillhouse.training.tracking import log_table

MODULE = "stillhouse.studies.consistency_lens.evaluate"
REGRESSION_EXAMPLES = 2048


class EvaluateStep(StrictModel):
    """The step's command line; `other_activations` takes the place of the lenses' own held-out activations."""

    model: Path
    activations: tuple[Path, ...]
    lenses: tuple[Path, ...]
    other_activations: Path | None = None
    results: Path
    item_scores: Path
    samples: Path
    table: Path
    record: Path
    work: Path
    model_name: str
    model_note: str
    dataset: str
    dataset_note: str
    evaluation: EvaluationSettings
    tracking: TrackingSettings
    trust_remote_code: bool


@dataclass(frozen=True)
class Subject:
    """One trained lens with its checkpoints by step."""

    condition: str
    seed: int
    run: RunSettings
    checkpoints: dict[int, Path]
    activations: Path

    def __str__(self) -> str:
        """How logs call it."""
        return f"{self.condition} seed {self.seed}"


def main(step: EvaluateStep) -> None:
    """Score all lenses; write results.json, items.parquet, samples.json, the trackers' table and run.json."""
    directories = [*step.activations, *step.lenses, *([step.other_activations] if step.other_activations else [])]
    inputs = {"model": step.model, **{str(path): path for path in directories}}
    with RunRecord(MODULE, step, inputs) as record:
        for path in (step.model, *step.lenses):
            verify_manifest(path)
        job = EvaluationJob(step)
        subjects = [find_subject(lens, step.activations) for lens in step.lenses]
        validation = pd.concat([job.validation_rows(subject) for subject in subjects], ignore_index=True)
        selections = select_checkpoints(measure(validation), step.evaluation.selection)
        chosen = [job.selected(subject, selections) for subject in subjects]
        items = pd.concat([validation, *(rows for rows, _ in chosen)], ignore_index=True)
        # On the validation split the lens and its baselines were scored twice; the full scores stand.
        items = items.drop_duplicates(["condition", "seed", "step", "split", "variant", "item_id"], keep="last")
        items = items.assign(model=step.model_name)
        samples = [sample for _, sample in chosen]
        results = ModelResults(
            model=step.model_name,
            model_note=step.model_note,
            dataset=step.dataset,
            dataset_note=step.dataset_note,
            evaluation=step.evaluation.model_dump(mode="json"),
            lenses=tuple(dict.fromkeys(job.facts(subject) for subject in subjects)),
            selections=tuple(selections),
            measurements=tuple(measure(items)),
        )
        write_results(results, step.results, items, ITEM_COLUMNS, step.item_scores)
        file = SamplesFile(
            model=step.model_name, dataset=step.dataset, split=step.evaluation.split, lenses=tuple(samples)
        )
        write_sealed_json(step.samples, file.model_dump(mode="json"))
        with staged_directory(step.table) as staging:
            name = f"consistency_lens-{step.model_name}-evaluation"
            log_table(step.tracking, staging, name, "samples", TABLE_COLUMNS, table_rows(samples))
        record.add(lenses=len(subjects), parts_computed=job.computed, parts_kept=job.kept)
        record.write(step.record)


def find_subject(lens: Path, activations: Sequence[Path]) -> Subject:
    """The lens that a training run left, with the extraction that its settings name."""
    settings = read_json(lens / "run.json")["settings"]
    run = RunSettings.model_validate(settings["run"])
    checkpoints = {int(path.name.partition("-")[2]): path for path in sorted(lens.glob("checkpoint-*"))}
    extracted = [path for path in activations if path.name == run.extraction.name]
    if not checkpoints or not extracted:
        missing = "checkpoint" if not checkpoints else f"activations '{run.extraction.name}'"
        raise UserError(f"{lens}: there is no {missing} of this lens: train it again")
    return Subject(settings["condition"], settings["seed"], run, checkpoints, extracted[0])


class EvaluationJob:
    """The evaluation of one model, and the parts of it that earlier attempts left."""

    def __init__(self, step: EvaluateStep) -> None:
        self.step, self.settings = step, step.evaluation
        self.tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        self.computed = self.kept = 0
        self._facts = {
            "model": data_digest(step.model),
            "other_activations": data_digest(step.other_activations) if step.other_activations else None,
            "code": code_digests(MODULE),
        }

    def facts(self, subject: Subject) -> LensFacts:
        """What the results say of a lens's condition."""
        return LensFacts(
            condition=subject.condition,
            layer=subject.run.lens.layer,
            text_length=subject.run.lens.text_length,
            train_examples=len(self._cached(subject, "train")),
            activations=subject.activations.name,
            language_model_positions=subject.run.loss.language_model_positions,
        )

    def validation_rows(self, subject: Subject) -> pd.DataFrame:
        """Rows of the lens and its two baselines on validation, for every checkpoint."""
        frames = []
        for step in subject.checkpoints:
            part = self._part(subject, step, "validation", {"batch_size", "batches"})
            if not self._has(part):
                logger.info("%s, step %d on validation", subject, step)
                lens, examples = self._lens(subject, step), self._examples(subject, "validation")
                rows = self._score(subject, lens, examples, self._lens_and_baselines(subject, lens, examples))
                write_part(rows, part)
            frames.append(self._identified(part, subject, step, "validation"))
        return pd.concat(frames, ignore_index=True)

    def selected(self, subject: Subject, selections: Sequence[Selection]) -> tuple[pd.DataFrame, LensSamples]:
        """Rows of every variant at the chosen checkpoint, and its verbose samples."""
        [step] = [s.step for s in selections if (s.condition, s.seed) == (subject.condition, subject.seed)]
        read = set(EvaluationSettings.model_fields) - {"selection", "activation_directory", "output_directory"}
        part = self._part(subject, step, self.settings.split, read)
        shown = part.with_suffix(".json")
        if not self._has(part):
            logger.info("%s, step %d on %s with every control", subject, step, self.settings.split)
            lens, examples = self._lens(subject, step), self._examples(subject, self.settings.split)
            variants = self._lens_and_baselines(subject, lens, examples)
            variants += self._controls(subject, lens, examples, variants[0])
            rows = self._score(subject, lens, examples, variants)
            samples = LensSamples(
                condition=subject.condition,
                seed=subject.seed,
                step=step,
                layer=subject.run.lens.layer,
                samples=tuple(self._samples(subject, lens, examples[: self.settings.verbose_samples])),
            )
            atomic_write_text(shown, samples.model_dump_json())
            write_part(rows, part)
        rows = self._identified(part, subject, step, self.settings.split)
        return rows, LensSamples.model_validate(read_json(shown))

    def _lens_and_baselines(self, subject: Subject, lens: Lens, examples: Sequence[Example]) -> list[Variant]:
        """The lens's greedy explanations, the mean training activation, and zeros."""
        texts = explanations(lens, activations_of(examples), self.settings.batch_size)
        mean = self._mean(subject).expand(len(examples), -1)
        return [
            Variant(LENS, texts),
            Variant(MEAN, reconstructions=mean),
            Variant(ZERO, reconstructions=torch.zeros_like(mean)),
        ]

    def _controls(self, subject: Subject, lens: Lens, examples: Sequence[Example], explained: Variant) -> list[Variant]:
        """Every control of `results.CONTROLS` that needs the lens, and the best of K samples."""
        settings, length = self.settings, subject.run.lens.text_length
        texts = explained.token_ids
        assert texts is not None
        partners = draw_partners(len(examples), settings.seed)
        filler = self.tokenizer.eos_token_id or 0
        activations = activations_of(examples)
        train, validation = self._cached(subject, "train"), self._cached(subject, "validation")
        regression = controls.TextRegression(
            embedding_matrix(lens.original),
            [train[index] for index in range(min(len(train), REGRESSION_EXAMPLES))],
            [validation[index] for index in range(min(len(validation), REGRESSION_EXAMPLES))],
        )
        variants = [
            Variant("original_tokens", controls.original_tokens(examples, length, filler)),
            Variant("shuffled", controls.shuffled(texts, settings.seed)),
            Variant("other_explanation", texts[partners]),
            Variant(
                "hard_coded", controls.hard_coded(self.tokenizer, settings.hard_coded_prompt, length, len(examples))
            ),
            Variant(
                "text_continuation",
                controls.text_continuation(lens.original, examples, length, settings.batch_size),
            ),
            Variant("text_regression", reconstructions=regression.predict(examples)),
            self._untrained(subject, examples),
        ]
        chosen = best_of(lens, activations, settings.best_of, settings.batch_size, settings.seed)
        return variants + [Variant(f"{BEST_OF}{k}", own) for k, own in chosen.items()]

    def _untrained(self, subject: Subject, examples: Sequence[Example]) -> Variant:
        """The same lens as it was before its first update."""
        lens = frozen(
            Lens.build(
                self.step.model,
                subject.run.lens,
                subject.run.training.precision,
                trust_remote_code=self.step.trust_remote_code,
            )
        )
        texts = explanations(lens, activations_of(examples), self.settings.batch_size)
        return Variant("untrained", texts, reconstructions(lens, texts, self.settings.batch_size))

    def _score(
        self, subject: Subject, lens: Lens, examples: Sequence[Example], variants: Sequence[Variant]
    ) -> pd.DataFrame:
        return score(lens, examples, variants, self._mean(subject), self.tokenizer, self.settings.batch_size)

    def _samples(self, subject: Subject, lens: Lens, examples: Sequence[Example]) -> list[Sample]:
        """What the page shows of single documents."""
        samples = []
        decode, length = self.tokenizer.decode, self.settings.continuation_tokens
        for example in examples:
            texts = explanations(lens, activations_of([example]), 1)
            rebuilt, mean = reconstructions(lens, texts, 1), self._mean(subject)[None]
            true, (other, of_mean) = next_token_distributions(lens, [example], [rebuilt, mean])
            place = torch.tensor([example.position])
            with swapped(lens.original, subject.run.lens.layer, place, rebuilt.to(lens.original.device)):
                continued = controls.continuations(lens.original, [example], length, cached=False)
            samples.append(
                Sample(
                    document_id=example.document_id,
                    before=decode(example.token_ids[: example.position]),
                    token=decode(example.token_ids[example.position]),
                    after=decode(example.token_ids[example.position + 1 :]),
                    explanation=decode(texts[0]),
                    kl=float(kl_divergence(true, other)),
                    kl_of_mean=float(kl_divergence(true, of_mean)),
                    original=self._top(true[0]),
                    reconstruction=self._top(other[0]),
                    original_continuation=decode(controls.continuations(lens.original, [example], length)[0]),
                    reconstruction_continuation=decode(continued[0]),
                )
            )
        return samples

    def _top(self, log_probabilities: torch.Tensor) -> tuple[Prediction, ...]:
        top = log_probabilities.exp().topk(self.settings.top_n)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple(Prediction(token=self.tokenizer.decode(token), probability=value) for token, value in pairs)

    def _lens(self, subject: Subject, step: int) -> Lens:
        run = subject.run
        return Lens.load(
            self.step.model,
            subject.checkpoints[step],
            run.lens,
            run.training.precision,
            trust_remote_code=self.step.trust_remote_code,
        )

    def _mean(self, subject: Subject) -> torch.Tensor:
        return self._cached(subject, "train").shards.mean("activations").float()

    def _examples(self, subject: Subject, split: str) -> list[Example]:
        """The documents that are scored: the split's first batches, or all of it."""
        directory = self.step.other_activations or subject.activations
        examples = CachedExamples(directory, split, subject.run.extraction, self.step.model)
        limit = self.settings.batch_size * self.settings.batches if self.settings.batches else len(examples)
        return [examples[index] for index in range(min(limit, len(examples)))]

    def _cached(self, subject: Subject, split: str) -> CachedExamples:
        return CachedExamples(subject.activations, split, subject.run.extraction, self.step.model)

    def _part(self, subject: Subject, step: int, split: str, read: set[str]) -> Path:
        """Where a checkpoint's rows are kept: named by what determines them, of the settings those that are `read`."""
        facts = {
            **self._facts,
            "weights": recorded_digests(subject.checkpoints[step]),
            "precision": resolve_precision(subject.run.training.precision),
            "run": subject.run.model_dump(mode="json", include={"lens", "training"}),
            "activations": data_digest(subject.activations),
            "split": split,
            "evaluation": self.settings.model_dump(mode="json", include=read),
        }
        return self.step.work / f"{short_digest(facts, 24)}.parquet"

    def _has(self, part: Path) -> bool:
        there = part.is_file()
        self.kept += there
        self.computed += not there
        return there

    def _identified(self, part: Path, subject: Subject, step: int, split: str) -> pd.DataFrame:
        identity = {"condition": subject.condition, "seed": subject.seed, "step": step, "split": split}
        return pd.read_parquet(part).assign(**identity)


if __name__ == "__main__":
    run_step(EvaluateStep, main)
