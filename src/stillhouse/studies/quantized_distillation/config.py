"""The configuration of quantised distillation: conditions as overrides of one set of run settings.

A run's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides,
merged in that order. This module stands between the workflow, which resolves runs while it builds the DAG, and
the step programs, which receive the resolved leaves; it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.quantization import LoraQuantisation, WeightFormat
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.config.training import LoraSettings, Precision, ScheduleSettings, TrainingSettings
from stillhouse.runtime.digests import short_digest
from stillhouse.studies.quantized_distillation.evaluation_settings import BaselineSettings, EvaluationSettings

Share = Annotated[float, Field(ge=0, le=1)]


class DistillationSettings(StrictModel):
    """Generalised knowledge distillation (GKD, arXiv 2306.13649): the divergence, and whose answers it is taken on."""

    beta: Annotated[
        Share,
        Field(
            description="0: KL(teacher || student); 1: KL(student || teacher); between: Jensen-Shannon, generalised."
        ),
    ] = 0.5
    on_policy_share: Annotated[
        Share,
        Field(description="Lambda: probability that a step's answers are the student's own samples."),
    ] = 0.0
    seq_kd: Annotated[
        bool, Field(description="The other steps' answers are the teacher's samples, not the data set's.")
    ] = False
    temperature: Annotated[float, Field(gt=0, description="Of both models' distributions in the loss.")] = 1.0


class SamplingSettings(StrictModel):
    """How answers are sampled in training, from the full vocabulary; the token that ends an answer belongs to it."""

    temperature: Annotated[float, Field(gt=0)] = 0.9
    min_new_tokens: Annotated[int, Field(ge=0, description="An answer does not end before.")] = 16
    max_new_tokens: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def lengths_are_in_order(self) -> SamplingSettings:
        """Refuse a shortest answer above the longest."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must not be above max_new_tokens ({self.max_new_tokens})"
            )
        return self


class TeacherSettings(StrictModel):
    """The full-precision model. Answers that the student samples are always scored online."""

    targets: Annotated[
        Literal["cached", "online"],
        Field(
            description="Targets of the data set's answers: from the teacher cache (its final hidden states), or from "
            "the student's own base in each step."
        ),
    ] = "cached"
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one forward pass for the cache.")] = 8192


class ValidationSettings(StrictModel):
    """What is measured before training and at each saved checkpoint, on data that it does not learn from."""

    items: Annotated[
        int, Field(ge=1, description="First N of the validation split: KL to the teacher and top-1 agreement.")
    ] = 64
    text: Annotated[str, Field(description="Data set of passages whose perplexity is followed.")] = "wiki_packaged"
    text_split: Annotated[str, Field(description="Its published split.")] = "train"
    text_tokens: Annotated[int, Field(ge=2, description="First N tokens of the joined passages.")] = 16_384
    window: Annotated[int, Field(ge=2, description="Tokens that the model sees at once.")] = 1024
    stride: Annotated[int, Field(ge=1, description="Tokens that each window adds; the others are its context.")] = 512
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one forward pass.")] = 8192

    @model_validator(mode="after")
    def windows_leave_nothing_out(self) -> ValidationSettings:
        """Refuse a stride that would skip tokens."""
        if self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) must not be above window ({self.window})")
        return self


class ExportSettings(StrictModel):
    """Which checkpoint of a student is merged, converted and evaluated."""

    selection: Annotated[
        Literal["validation_kl", "last"],
        Field(description="The lowest KL to the teacher on validation, or the last one."),
    ] = "validation_kl"


class CacheSettings(StrictModel):
    """What determines the teacher's targets, and nothing else: runs that agree on it share one cache."""

    prompt_format: Literal["auto", "chat", "plain"]
    max_length: int
    response_room: int
    precision: Precision
    train_examples: int | None
    batch_tokens: int

    @property
    def name(self) -> str:
        """A name for paths, different wherever the targets are."""
        return f"hidden-{short_digest(self.model_dump(mode='json'))}"


def _training() -> TrainingSettings:
    return TrainingSettings(
        lora=LoraSettings(rank=32, alpha=64, dropout=0.05),
        steps=1000,
        batch_size=8,
        learning_rate=5e-6,
        schedule=ScheduleSettings(kind="linear", warmup_steps=200),
        save_every=100,
        resume_every=50,
    )


class RunSettings(StrictModel):
    """Everything that one student's training reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    prompt_format: Annotated[
        Literal["auto", "chat", "plain"], Field(description="auto: chat where the tokenizer has a template.")
    ] = "auto"
    max_length: Annotated[int, Field(ge=16, description="Tokens of prompt and answer; longer answers are cut.")] = 1024
    response_room: Annotated[
        int,
        Field(
            ge=1,
            description="Leave out (and count) examples whose prompt, or answer after the cut, leaves fewer tokens.",
        ),
    ] = 32
    train_examples: Annotated[int | None, Field(ge=1, description="Use the first N examples; null: all.")] = None
    format: Annotated[WeightFormat, Field(description="The student's weights.")] = WeightFormat()
    lora_quantisation: Annotated[
        LoraQuantisation,
        Field(description="merged: Q(W + BA)x, as it is deployed; beside: Q(W)x + BAx, as published."),
    ] = "merged"
    distillation: DistillationSettings = DistillationSettings()
    sampling: SamplingSettings = SamplingSettings()
    teacher: TeacherSettings = TeacherSettings()
    validation: ValidationSettings = ValidationSettings()
    training: TrainingSettings = _training()

    @property
    def samples(self) -> bool:
        """Whether any step's answers are sampled."""
        return self.distillation.on_policy_share > 0 or self.distillation.seq_kd

    @property
    def reads_data_answers(self) -> bool:
        """Whether any step's answers are the data set's."""
        return self.distillation.on_policy_share < 1 and not self.distillation.seq_kd

    @property
    def cache(self) -> CacheSettings | None:
        """The teacher cache that this run reads, None if it reads none."""
        if not self.reads_data_answers or self.teacher.targets == "online":
            return None
        return CacheSettings(
            prompt_format=self.prompt_format,
            max_length=self.max_length,
            response_room=self.response_room,
            precision=self.training.precision,
            train_examples=self.train_examples,
            batch_tokens=self.teacher.batch_tokens,
        )

    def leaves(self) -> dict[str, Any]:
        """The settings that this run's training reads: others would only make it run again."""
        leaves = self.model_dump(mode="json")
        if not self.samples:
            del leaves["sampling"]
        if not self.reads_data_answers:
            del leaves["teacher"]
        else:
            del leaves["teacher"]["batch_tokens"]
        return leaves

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse a student whose base learns, and lengths that leave no room for an answer."""
        if self.training.method != "lora":
            raise SettingError(
                ("training", "method"), "must be lora: the student's own base, unchanged, is the teacher"
            )
        if self.response_room >= self.max_length:
            raise ValueError(f"response_room ({self.response_room}) must be below max_length ({self.max_length})")
        return self


class TaskSettings(DataSettings):
    """The instruction data and its division into train, validation and test by seed."""

    dataset: str = "alpaca_packaged"
    train: SplitSettings = SplitSettings(source="train")
    validation: SplitSettings = SplitSettings(source="train", size=100)
    test: SplitSettings = SplitSettings(source="train", size=200)


# Evaluated, never trained: the full-precision model, and its weights rounded after training by three methods.
UNTRAINED = ("teacher", "ptq", "gptq", "awq")

CONDITIONS: dict[str, Overrides] = {
    "off_policy": {},
    "on_policy": {"distillation": {"on_policy_share": 1.0}},
    "mixed_policy": {"distillation": {"on_policy_share": 0.5}},
    "teacher_samples": {"distillation": {"seq_kd": True}},
    "off_policy_beside": {"lora_quantisation": "beside"},
    "on_policy_beside": {"lora_quantisation": "beside", "distillation": {"on_policy_share": 1.0}},
}


class QuantizedDistillationConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which models, conditions and seeds run, and what each of them overrides."""

    untrained: ClassVar[tuple[str, ...]] = UNTRAINED

    models: Annotated[tuple[str, ...], Field(description="Catalogue names of the models.")] = ("smollm2_135m",)
    conditions: Annotated[tuple[str, ...], Field(min_length=1, description="Conditions to run and report.")] = (
        "teacher",
        "ptq",
        "off_policy",
        "on_policy",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 123, 456)
    task: TaskSettings = TaskSettings()
    defaults: Annotated[RunSettings, Field(description="Settings of a run before any override.")] = RunSettings()
    model_settings: Annotated[dict[str, Overrides], Field(description="Overrides of the defaults per model.")] = {}
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    sweeps: dict[str, Sweep] = {}
    export: ExportSettings = ExportSettings()
    baselines: BaselineSettings = BaselineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> QuantizedDistillationConfig:
        """Refuse unknown conditions and overrides that do not make valid run settings."""
        self.check_condition_names()
        for model in self.models:
            for condition in dict.fromkeys([*self.condition_settings, *self.trained_conditions]):
                self.run_settings(model, condition)
        return self

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses: models, training data, what is evaluated on."""
        for model in self.models:
            yield Reference("model", model, ("models",))
            for condition in self.trained_conditions:
                text = self.run_settings(model, condition).validation.text
                yield Reference("data set", text, ("defaults", "validation", "text"))
        yield Reference("data set", self.task.dataset, ("task", "dataset"))
        for name, location in self.evaluation.datasets():
            yield Reference("data set", name, ("evaluation", *location))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a model before any condition; the baselines' weight format is theirs."""
        return laid_over(self.defaults, ("model_settings", subject), self.model_settings.get(subject, {}))

    @remembered
    def caches(self, model: str) -> dict[str, CacheSettings]:
        """The teacher caches of a model by name; conditions, sweep points and seeds share them."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        return {cache.name: cache for run in runs if (cache := run.cache)}

    @remembered
    def formats(self, model: str) -> dict[str, WeightFormat]:
        """The weight formats of a model's students by name, that of the baselines first; each has its own `ptq`."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        used = (self.subject_defaults(model).format, *(run.format for run in runs))
        return {chosen.name: chosen for chosen in used}


# The study at a size for two cores: a real model and real data, too few steps and items for a claim about the method.
# SmolLM2's packaged weights come from an asymmetric 4-bit grid of group 32, on which rounding shows no gap at all:
# symmetric groups of 64 do. The learning rate is for a few steps; hundreds want far less.
EMBEDDED: Overrides = {
    "conditions": ["teacher", "ptq", "off_policy", "on_policy"],
    "task": {
        "train": {"source": "train", "size": 128},
        "validation": {"source": "train", "size": 16},
        "test": {"source": "train", "size": 64},
    },
    "defaults": {
        "prompt_format": "plain",
        "max_length": 64,
        "response_room": 16,
        "format": {"kind": "int4", "group_size": 64},
        "distillation": {"beta": 0.0},
        "sampling": {"min_new_tokens": 8, "max_new_tokens": 24},
        "teacher": {"batch_tokens": 1024},
        "validation": {"items": 12, "text_tokens": 512, "window": 256, "stride": 128, "batch_tokens": 1024},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-3,
            "schedule": {"kind": "linear", "warmup_steps": 1},
            "save_every": 3,
            "resume_every": 3,
        },
    },
    "baselines": {"samples": 16, "tokens": 256},
    "evaluation": {
        "tasks": {
            "arc_easy": {"dataset": "arc_easy_packaged", "split": "test", "items": 24},
            "winogrande": {"dataset": "winogrande_packaged", "split": "validation", "items": 32},
        },
        "texts": {"wikipedia": {"dataset": "wiki_packaged", "tokens": 1024}},
        "window": 512,
        "stride": 256,
        "answers": 24,
        "gap_seeds": 1,
        "batch_tokens": 2048,
    },
}
