"""Training examples of a generator: an adapter, the prompts that stand for it, and its delta activation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from stillhouse.models.lora_tensors import AdapterTensors, check_same_layout, read_adapter, stacked
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.manifest import AdapterRow, read_collection
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, read_prompts
from stillhouse.studies.lora_generation.teacher_settings import Role, ShardSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder


@dataclass(frozen=True)
class GeneratorBatch:
    """Examples of one forward pass: conditions [batch, prompts, vectors, width], adapters, deltas [batch, hidden].

    `indices` are the examples' places in their data; `tokens` counts what the forward pass reads.
    """

    indices: tuple[int, ...]
    conditions: Tensor
    adapters: AdapterTensors
    deltas: Tensor
    tokens: int

    def to(self, device: torch.device) -> Self:
        """The same examples on `device`."""
        moved = (self.conditions.to(device), self.adapters.to(device), self.deltas.to(device))
        return type(self)(self.indices, *moved, self.tokens)


class AdapterExamples:
    """Adapters of a collection as training data: conditions and deltas in memory, weights read when they are wanted.

    `read` is the number of prompts that a generator reads, `probe_tokens` what the delta of one adapter costs.
    """

    def __init__(
        self,
        collection: Path,
        rows: Sequence[AdapterRow],
        deltas: DeltaCache,
        encoder: PromptEncoder,
        read: int,
        probe_tokens: int,
    ) -> None:
        self.collection, self.rows = collection, rows
        self.deltas = deltas.of([row.digest for row in rows])
        prompts = [self._prompts(row, read) for row in rows]
        fewest = min(map(len, prompts))
        self.conditions = torch.stack([encoder.embed(own[:fewest]) for own in prompts])
        self.tokens = read * self.conditions.shape[2] + probe_tokens
        self.layout = self[0].layout
        for place, row in enumerate(rows):
            check_same_layout(self[place].layout, self.layout, collection / row.name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> AdapterTensors:
        """The weights of one adapter."""
        return read_adapter(self.collection / self.rows[place].name)

    def adapters(self) -> Iterator[AdapterTensors]:
        """The weights of all adapters, one after the other."""
        return (self[place] for place in range(len(self)))

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[GeneratorBatch]:
        """The examples of `indices` in groups of at most `token_budget` tokens, at least one."""
        size = max(1, token_budget // self.tokens)
        for start in range(0, len(indices), size):
            places = list(indices[start : start + size])
            yield GeneratorBatch(
                tuple(places),
                self.conditions[places],
                stacked([self[place] for place in places]),
                self.deltas[places],
                len(places) * self.tokens,
            )

    def _prompts(self, row: AdapterRow, read: int) -> list[str]:
        path = self.collection / row.name / PROMPTS_FILE
        prompts = read_prompts(path)
        if len(prompts) < read:
            raise UserError(f"{path}: has {len(prompts)} prompts, generator.prompts is {read}: lower it")
        return prompts


def rows_of(collection: Path, role: Role, shards: ShardSettings, held_out_tasks: tuple[str, ...]) -> list[AdapterRow]:
    """The adapters that play `role` for a generator, flagged ones only where the settings say so.

    Raises `UserError` where none is left.
    """
    playing = [row for row in read_collection(collection) if shards.role(row.task, row.shard, held_out_tasks) == role]
    chosen = [row for row in playing if shards.flagged == "use" or not row.flagged]
    if len(chosen) < len(playing):
        left_out = len(playing) - len(chosen)
        logger.warning("%s: %d of %d adapters are no better than the base: left out", role, left_out, len(playing))
    if not chosen:
        raise UserError(
            f"{collection}: no adapter is left for '{role}' ({len(playing)} are flagged as no better than the base): "
            "train better teachers, use more shards, or set teachers.flagged to use"
        )
    return chosen
