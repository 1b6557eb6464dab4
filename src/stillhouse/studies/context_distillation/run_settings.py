"""The settings of one student: what a condition, a model or a sweep point may change.

They stand below `config`, which resolves them run by run; no torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel
from stillhouse.config.training import Precision, TrainingSettings
from stillhouse.runtime.digests import short_digest

Exemplars = Literal["worked", "question_only", "shuffled_answers", "shuffled_answers_as_published", "wrong_answers"]


class ContextSettings(StrictModel):
    """The worked examples that a teacher, or a few-shot evaluation, sees before the question."""

    shots: Annotated[int, Field(ge=0)] = 8
    sampling: Annotated[
        Literal["per_example", "grouped", "fixed"],
        Field(description="Fresh shots per example (as published), per group of examples, or one set for all."),
    ] = "per_example"
    groups: Annotated[int, Field(ge=1, description="Number of groups when sampling is grouped.")] = 16
    exemplars: Annotated[
        Exemplars,
        Field(
            description="Worked examples, or a control: questions alone, answers deranged among the shots "
            "(or permuted as published, fixed points allowed), answers whose final number is wrong."
        ),
    ] = "worked"
    seed: int = 42


class TeacherSettings(StrictModel):
    """Who teaches: the student's own base (model null), another model of the same vocabulary, or a LoRA of the base."""

    model: Annotated[str | None, Field(description="Catalogue name; null is the student's own base.")] = None
    adapter: Annotated[
        bool, Field(description="Teach with a LoRA trained on the task (rule context_distillation_task_teacher).")
    ] = False
    context: ContextSettings = ContextSettings()
    max_length: Annotated[int, Field(ge=16, description="Longest teacher sequence, in tokens.")] = 4096
    targets: Annotated[
        Literal["cached", "online"],
        Field(description="Targets from the teacher cache or computed in each step."),
    ] = "cached"
    cache_top_k: Annotated[int, Field(ge=1, description="K_max: logits kept per answer position.")] = 256
    precision: Precision = "auto"
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one teacher forward pass.")] = 8192


class DistillationSettings(StrictModel):
    """The term that is added to the answer's cross entropy: `weight * loss`."""

    loss: Literal["none", "mse_top_k", "mse_random_k", "kl"] = "mse_top_k"
    weight: Annotated[float, Field(ge=0, description="Lambda.")] = 0.5
    top_k: Annotated[int, Field(ge=1, description="K of mse_top_k and mse_random_k.")] = 256
    temperature: Annotated[float, Field(gt=0, description="Temperature of kl.")] = 1.0
    positions: Annotated[
        Literal["predicting", "one_late"],
        Field(description="Logits that predict the answer tokens, or one position late as published."),
    ] = "predicting"
    only_first_steps: Annotated[int | None, Field(ge=1)] = None
    only_last_steps: Annotated[int | None, Field(ge=1)] = None


class CacheSettings(StrictModel):
    """What determines a teacher's targets, and nothing else: runs that agree on it share one cache."""

    mode: Literal["top_k", "hidden"]
    model: str | None
    adapter: bool
    context: ContextSettings
    max_length: int
    top_k: Annotated[int, Field(description="K_max; 0 in mode hidden.")]
    precision: Precision
    batch_tokens: int
    prompt_format: Literal["auto", "chat", "plain"]
    overlong: Literal["error", "skip"]
    train_examples: int | None

    @property
    def name(self) -> str:
        """A name for paths: readable, and different wherever the targets are."""
        context = "zero_shot" if self.context.shots == 0 else f"{self.context.shots}_shot-{self.context.exemplars}"
        return f"{context}-{self.mode}-{short_digest(self.model_dump(mode='json'))}".lower()


class RunSettings(StrictModel):
    """Everything that one student's training reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    prompt_format: Annotated[
        Literal["auto", "chat", "plain"], Field(description="auto: chat where the tokenizer has a template.")
    ] = "auto"
    max_length: Annotated[int, Field(ge=16, description="Longest student sequence, in tokens.")] = 512
    overlong: Annotated[
        Literal["error", "skip"], Field(description="A sequence over the limit: refuse, or skip and count.")
    ] = "error"
    train_examples: Annotated[int | None, Field(ge=1, description="Use the first N examples; null: all.")] = None
    teacher: TeacherSettings = TeacherSettings()
    distillation: DistillationSettings = DistillationSettings()
    training: TrainingSettings = TrainingSettings()

    @property
    def cache_mode(self) -> Literal["none", "top_k", "hidden"]:
        """What the teacher cache must hold for this run's loss."""
        if self.distillation.loss == "none" or self.distillation.weight == 0:
            return "none"
        return "top_k" if self.distillation.loss == "mse_top_k" else "hidden"

    def leaves(self) -> dict[str, Any]:
        """The settings that this run's training reads: those of a teacher that it never meets would only rerun it."""
        leaves = self.model_dump(mode="json")
        # Fixed shots are taken out of the training set, whatever the loss: every condition learns the same examples.
        context = {"context": leaves["teacher"]["context"]} if self.teacher.context.sampling == "fixed" else {}
        if self.cache_mode == "none":
            leaves |= {"distillation": {"loss": "none"}, "teacher": context}
        elif self.teacher.targets == "cached":
            leaves["teacher"] = {"cache_top_k": self.teacher.cache_top_k, **context}
        return leaves

    @property
    def cache(self) -> CacheSettings | None:
        """The teacher cache that this run reads, None if it reads none."""
        if self.cache_mode == "none" or self.teacher.targets == "online":
            return None
        return CacheSettings(
            mode=self.cache_mode,
            model=self.teacher.model,
            adapter=self.teacher.adapter,
            context=self.teacher.context,
            max_length=self.teacher.max_length,
            top_k=self.teacher.cache_top_k if self.cache_mode == "top_k" else 0,
            precision=self.teacher.precision,
            batch_tokens=self.teacher.batch_tokens,
            prompt_format=self.prompt_format,
            overlong=self.overlong,
            train_examples=self.train_examples,
        )

    @property
    def repeated_mistakes(self) -> tuple[str, ...]:
        """The settings of this run that repeat a mistake of the published code."""
        chosen = (self.distillation.positions, self.teacher.context.exemplars) if self.cache_mode != "none" else ()
        return tuple(choice for choice in chosen if choice in ("one_late", "shuffled_answers_as_published"))

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse K above K_max, an online teacher that is not the student's base, a window outside the run."""
        if self.teacher.targets == "online":
            if self.teacher.model is not None or self.teacher.adapter:
                raise ValueError(
                    "teacher.targets online means the student's own base: leave teacher.model and teacher.adapter "
                    "unset, or set targets to cached"
                )
            if self.training.method == "full" and self.cache_mode != "none":
                raise ValueError(
                    "teacher.targets online needs training.method lora: a base that learns does not stay the teacher"
                )
        if self.cache_mode == "top_k" and self.distillation.top_k > self.teacher.cache_top_k:
            raise ValueError(
                f"distillation.top_k ({self.distillation.top_k}) is above teacher.cache_top_k "
                f"({self.teacher.cache_top_k}): lower K or raise K_max"
            )
        for name in ("only_first_steps", "only_last_steps"):
            window = getattr(self.distillation, name)
            if window is not None and window > self.training.steps:
                raise ValueError(f"distillation.{name} ({window}) is above training.steps ({self.training.steps})")
        return self
