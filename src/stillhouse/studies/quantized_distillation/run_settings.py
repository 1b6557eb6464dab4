"""What one student's training reads: the settings that a condition, a model or a sweep may override.

`config` resolves them; the step programs receive the leaves. No torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel
from stillhouse.config.quantization import LoraQuantisation, WeightFormat
from stillhouse.config.training import LoraSettings, Precision, ScheduleSettings, TrainingSettings
from stillhouse.runtime.digests import short_digest

Share = Annotated[float, Field(ge=0, le=1)]
# Which of a student's checkpoints is deployed.
Selection = Literal["validation_kl", "last"]


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
