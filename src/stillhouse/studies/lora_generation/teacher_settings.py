"""Settings of tasks and of their teacher adapters: which shards, seeds and steps there are, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.training import LoraSettings, ScheduleSettings, TrainingSettings

# How a task is asked, as lm-evaluation-harness does: ARC and PIQA `Question: ... Answer:`, BoolQ the same after its
# passage, OpenBookQA and HellaSwag the text itself, WinoGrande each name in its blank; `worked`: answers are generated.
Style = Literal["question", "passage", "plain", "blank", "worked"]
Role = Literal["train", "validation", "held_out_shard", "held_out_task"]


class TaskSettings(DataSettings):
    """A task's data set and its division; teachers learn from shards of the train split."""

    train: SplitSettings = SplitSettings(source="train")
    validation: SplitSettings = SplitSettings(source="train", size=200)
    test: SplitSettings = SplitSettings(source="test")
    style: Annotated[Style, Field(description="Form of its prompts; worked: answers are generated, as GSM8K's.")] = (
        "question"
    )


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


def _published(style: Style, dataset: str, test: str = "test") -> TaskSettings:
    return TaskSettings(dataset=dataset, style=style, test=SplitSettings(source=test))


TASKS: dict[str, TaskSettings] = {
    "arc_easy": _published("question", "arc_easy"),
    "arc_challenge": _published("question", "arc_challenge"),
    "boolq": _published("passage", "boolq", "validation"),
    "hellaswag": _published("plain", "hellaswag", "validation"),
    "winogrande": _published("blank", "winogrande", "validation"),
    "openbookqa": _published("plain", "openbookqa"),
    "piqa": _published("question", "piqa_train_packaged", "validation"),
    "gsm8k": _published("worked", "gsm8k"),
}
