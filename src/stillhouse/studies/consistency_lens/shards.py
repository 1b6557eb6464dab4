"""Sharded safetensors with the tokens of documents, and what was measured of them: writer and memory-mapped reader.

A shard holds consecutive documents of one split: `token_ids` [sum of lengths], `offsets` [documents + 1], and any
number of tensors with one row a document; its metadata names the documents. Each shard is written whole, by whichever
process it falls to, and depends on its own documents alone: so a killed build goes on from the finished shards, and
two processes write the same files as one. The manifest holds the shards' sizes, digests and numbers of documents.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    atomic_write_bytes,
    link_or_copy,
    staged_directory,
    verify_manifest,
    write_manifest,
)
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord

OPEN_SHARDS = 64


@dataclass(frozen=True)
class ShardPlan:
    """Which rows of a split one shard holds."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"{self.split}-{self.number:05d}.safetensors"


@dataclass(frozen=True)
class ShardContent:
    """The documents of a shard, and tensors with one row for each."""

    document_ids: Sequence[str]
    token_ids: Sequence[Tensor]
    rows: Mapping[str, Tensor]


def plan_shards(splits: Mapping[str, int], documents_per_shard: int) -> list[ShardPlan]:
    """The shards of all splits; `splits` gives the number of documents of each."""
    return [
        ShardPlan(split, number, range(start, min(start + documents_per_shard, count)))
        for split, count in splits.items()
        for number, start in enumerate(range(0, count, documents_per_shard))
    ]


def build_shards(
    work: Path,
    plans: Sequence[ShardPlan],
    compute: Callable[[ShardPlan], ShardContent],
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Write the shards that fall to process `rank` into `work`, except those that an earlier attempt finished.

    `compute` must depend on nothing but its argument.
    """
    own = plans[rank::processes]
    missing = [plan for plan in own if not _is_whole(work / plan.name, len(plan.rows))]
    for done, plan in enumerate(missing, start=len(own) - len(missing) + 1):
        atomic_write_bytes(work / plan.name, _serialised(compute(plan)))
        logger.info("%s written, %d of %d", plan.name, done, len(own))


def publish_shards(
    output: Path, work: Path, plans: Sequence[ShardPlan], facts: Mapping[str, Any], record: RunRecord
) -> None:
    """Put the finished shards into `output`, whole or not at all; `facts` say in the manifest what they are of."""
    splits: dict[str, dict[str, int]] = {}
    with staged_directory(output) as staging:
        for plan in plans:
            link_or_copy(work / plan.name, staging / plan.name)
            splits.setdefault(plan.split, {})[plan.name] = len(plan.rows)
        write_manifest(staging, {"facts": dict(facts), "splits": splits})
        # The record is outside the manifest: it holds times, and the digest of the same shards must not change.
        record.write(staging / "run.json")
    # A link is the same file: left behind, damage to the output would come back when it is made again.
    for plan in plans:
        (work / plan.name).unlink()


class Shards:
    """Memory-mapped rows of one split, over all of its shards; opening checks the split's files.

    Raises `UserError` that names a missing or corrupt file, or a split that the artefact does not hold.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self.directory = directory
        manifest = verify_manifest(directory, f"{split}-*")
        self.facts: dict[str, Any] = manifest.get("facts", {})
        splits: dict[str, dict[str, int]] = manifest.get("splits", {})
        if split not in splits:
            raise UserError(f"{directory}: holds no split '{split}' (it has {', '.join(splits) or 'none'})")
        self._paths = [directory / name for name in splits[split]]
        self._ends = [0, *accumulate(splits[split].values())]
        # Bounded, since a corpus may have thousands of shards.
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, name: str, index: int) -> Tensor:
        """The row of document `index` in the tensor `name`."""
        shard, place = self._locate(index)
        return self._slice(shard, name, place, place + 1)[0]

    def token_ids(self, index: int) -> Tensor:
        """The document's tokens, [tokens] int64."""
        shard, place = self._locate(index)
        start, end = self._slice(shard, "offsets", place, place + 2).tolist()
        return self._slice(shard, "token_ids", start, end).long()

    def document_id(self, index: int) -> str:
        """The document's id in the corpus."""
        shard, place = self._locate(index)
        return self._open(shard)[1][place]

    def lengths(self) -> Tensor:
        """The number of tokens of every document, [documents]."""
        counts = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        return torch.cat([self._slice(shard, "offsets", 0, count + 1).diff() for shard, count in enumerate(counts)])

    def mean(self, name: str) -> Tensor:
        """The mean over all documents of the tensor `name`, in fp64, one shard in memory at a time."""
        counts = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        sums = [self._slice(shard, name, 0, count).double().sum(0) for shard, count in enumerate(counts)]
        return torch.stack(sums).sum(0) / len(self)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index) - 1
        return shard, index - self._ends[shard]

    def _open_shard(self, shard: int) -> tuple[Any, list[str]]:
        try:
            tensors = safe_open(self._paths[shard], framework="pt")
            return tensors, json.loads(tensors.metadata()["documents"])
        except (SafetensorError, OSError) as error:
            remedy = f"delete {self.directory} and run the same command again"
            raise UserError(f"{self._paths[shard]}: cannot be read ({error}): {remedy}") from error

    def _slice(self, shard: int, name: str, start: int, end: int) -> Tensor:
        rows: Tensor = self._open(shard)[0].get_slice(name)[start:end]
        return rows


def _serialised(content: ShardContent) -> bytes:
    lengths = torch.tensor([0, *map(len, content.token_ids)])
    tensors = {name: tensor.contiguous() for name, tensor in content.rows.items()}
    tensors |= {"token_ids": torch.cat(list(content.token_ids)).to(torch.int32), "offsets": lengths.cumsum(0)}
    return save(tensors, {"documents": json.dumps(list(content.document_ids))})


def _is_whole(path: Path, documents: int) -> bool:
    try:
        with safe_open(path, framework="pt") as tensors:
            return len(json.loads(tensors.metadata()["documents"])) == documents
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
        return False
