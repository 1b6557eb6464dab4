"""The arms of a case: every way to get an adapter, or a context, from a handful of prompts of a task.

A case is a held-out teacher adapter; the arms get the first of the prompts that stand for it, which come from its
shard of the train split and are never scored. What an arm makes is left as a peft folder.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stillhouse.models.lora_tensors import AdapterTensors, mean_adapter, read_adapter, write_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.config import Arm
from stillhouse.studies.lora_generation.examples import rows_of
from stillhouse.studies.lora_generation.generators import Generator
from stillhouse.studies.lora_generation.manifest import AdapterRow, read_collection
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, SolvedPrompt, read_prompts, read_solved_prompts
from stillhouse.studies.lora_generation.results import Subject
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder

Made = TypeVar("Made")


@dataclass(frozen=True)
class Entry:
    """A subject with what it needs: an adapter's folder or shots, what the adapter cost, and where it comes from."""

    subject: Subject
    folder: Path | None = None
    shots: tuple[SolvedPrompt, ...] = ()
    seconds: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Collection:
    """A model's teacher adapters, and the folder in which what the arms make is left."""

    directory: Path
    made: Path
    model_name: str
    shards: ShardSettings
    encoder: PromptEncoder
    prompts: int
    seed: int

    @cached_property
    def rows(self) -> list[AdapterRow]:
        """Every adapter."""
        return read_collection(self.directory)

    @property
    def cases(self) -> list[AdapterRow]:
        """The teachers of held-out shards, of every task, at the last step of their run."""
        last = max(row.step for row in self.rows)
        first = self.shards.shards - self.shards.held_out_shards
        return [row for row in self.rows if row.shard >= first and row.step == last]

    def solved(self, row: AdapterRow) -> list[SolvedPrompt]:
        """The first prompts that stand for an adapter, as many as the headline's generators read."""
        path = self.directory / row.name / PROMPTS_FILE
        prompts = read_solved_prompts(path)
        if len(prompts) < self.prompts:
            raise UserError(
                f"{path}: has {len(prompts)} prompts, generators read {self.prompts}: raise teachers.prompts"
            )
        return prompts[: self.prompts]

    def texts(self, row: AdapterRow) -> list[str]:
        """Their texts alone."""
        return [one.prompt for one in self.solved(row)]

    def offered(self, row: AdapterRow) -> list[str]:
        """The texts of all prompts that stand for an adapter; a generator takes the first ones, as many as it reads."""
        return read_prompts(self.directory / row.name / PROMPTS_FILE)

    def learnt_from(self, held_out: tuple[str, ...]) -> list[AdapterRow]:
        """What a generator that never sees some tasks learns from."""
        return rows_of(self.directory, "train", self.shards, held_out)

    def write(self, adapter: AdapterTensors, name: str) -> Path:
        """Leave an adapter that was made in a folder of its own."""
        write_adapter(adapter, self.made / name, self.model_name)
        return self.made / name


def given(collection: Collection, case: AdapterRow, in_context: int | None) -> dict[Arm, Entry]:
    """The arms that need nothing but the case: its teacher, and its prompts with their answers as a context."""
    shots = tuple(collection.solved(case)[:in_context])
    teacher = Entry(_of(case, "teacher"), collection.directory / case.name, (), case.seconds, case.name)
    return {"teacher": teacher, "in_context": Entry(_of(case, "in_context"), shots=shots)}


def from_collection(
    collection: Collection, cases: Sequence[AdapterRow], held_out: tuple[str, ...], wanted: Sequence[Arm]
) -> list[Entry]:
    """The mean of what a generator learns from, the adapter whose prompts are nearest, and one of another task."""
    rows, name = collection.learnt_from(held_out), "+".join(held_out)
    if "mean_adapter" in wanted:
        mean, mean_seconds = _timed(lambda: mean_adapter([read_adapter(collection.directory / r.name) for r in rows]))
        mean_folder = collection.write(mean, f"mean_adapter/without_{name or 'none'}")
    embedded = {}
    if "nearest_adapter" in wanted:
        embedded = {row.name: collection.encoder.embed(collection.texts(row)).mean((0, 1)) for row in rows}
    entries = []
    for case in cases:
        for arm in wanted:
            subject = _of(case, arm, held_out=name)
            if arm == "mean_adapter":
                entries.append(Entry(subject, mean_folder, (), mean_seconds))
            elif arm == "nearest_adapter":
                source, seconds = _timed(partial(_nearest, collection, case, embedded))
                entries.append(Entry(subject, collection.directory / source, (), seconds, source))
            elif others := [row.name for row in rows if row.task != case.task]:
                source = random.Random(f"{collection.seed}/{case.name}").choice(others)
                entries.append(Entry(subject, collection.directory / source, (), 0.0, source))
    return entries


def generated(
    collection: Collection, cases: Sequence[AdapterRow], generator: Generator, condition: str, seed: int, held_out: str
) -> list[Entry]:
    """What a generator writes when it reads the prompts of each case; seconds from the prompts to the tensors."""
    entries = []
    for case in cases:
        texts = collection.offered(case)
        adapter, seconds = _timed(partial(generator.generate, texts, collection.encoder))
        folder = collection.write(adapter, f"generated/{condition}/seed_{seed}/{case.task}/{case.shard}-{case.seed}")
        subject = _of(case, "generated", condition=condition, seed=seed, held_out=held_out)
        entries.append(Entry(subject, folder, (), seconds))
    return entries


def _of(case: AdapterRow, arm: Arm, **further: object) -> Subject:
    return Subject(case.task, arm, case.shard, case.seed, **further)  # type: ignore[arg-type]


def _nearest(collection: Collection, case: AdapterRow, embedded: Mapping[str, Tensor]) -> str:
    """The adapter whose prompts' mean embedding has the largest cosine to that of the case's, embedded anew."""
    direction = collection.encoder.embed_anew(collection.texts(case)).mean((0, 1))
    names = sorted(embedded)
    cosines = cosine_similarity(torch.stack([embedded[name] for name in names]), direction[None], dim=1)
    return names[int(cosines.argmax())]


def _timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What `make` makes, and the seconds that it took."""
    started = time.monotonic()
    made = make()
    return made, time.monotonic() - started
