"""A teacher's targets on disk: sharded safetensors with one row per answer position, and their reader.

Every answer of n tokens has n + 1 rows: the positions that predict its tokens, and the one after the last token
(the published protocol reads logits one position late). Mode `top_k` keeps the largest raw logits, the
log-partition and the gold token's logit; mode `hidden` keeps what the output embeddings read, and the teacher's
output embeddings once. Shards are written whole and one after another, so a build that is killed goes on from the
last finished one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from stillhouse.models.output_head import OutputHead
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    atomic_write_bytes,
    link_or_copy,
    read_json,
    staged_directory,
    verify_manifest,
    write_json,
    write_manifest,
)
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord

CacheMode = Literal["top_k", "hidden"]
INDEX_FILE, HEAD_FILE = "index.json", "head.safetensors"


@dataclass(frozen=True)
class TeacherTargets:
    """Targets of one or more answers, one after another; rows = sum of (answer tokens + 1).

    top_ids: [rows, K] int32, by falling logit. top_logits: [rows, K], raw. log_partition: [rows] fp32.
    gold_logit: [rows], NaN in the row after the last token, which has no gold token. hidden: [rows, hidden].
    """

    answers: tuple[tuple[int, ...], ...]
    top_ids: Tensor | None = None
    top_logits: Tensor | None = None
    log_partition: Tensor | None = None
    gold_logit: Tensor | None = None
    hidden: Tensor | None = None

    @classmethod
    def from_logits(cls, answer: Sequence[int], logits: Tensor, top_k: int) -> TeacherTargets:
        """Mode `top_k` of one answer, from its logits [n + 1, vocab]."""
        top = logits.topk(top_k, dim=-1)
        gold = torch.full((len(logits),), torch.nan, dtype=logits.dtype, device=logits.device)
        gold[:-1] = logits[:-1].gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
        log_partition = logits.float().logsumexp(-1)
        return cls((tuple(answer),), top.indices.to(torch.int32), top.values, log_partition, gold)

    @classmethod
    def from_hidden(cls, answer: Sequence[int], hidden: Tensor) -> TeacherTargets:
        """Mode `hidden` of one answer, from the hidden states [n + 1, hidden] before the output embeddings."""
        return cls((tuple(answer),), hidden=hidden)

    @classmethod
    def join(cls, parts: Sequence[TeacherTargets]) -> TeacherTargets:
        """The targets of several answers as one."""
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return cls(tuple(answer for part in parts for answer in part.answers), **tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this mode has, by field."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str) -> TeacherTargets:
        """The same targets on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class CacheFacts:
    """What a cache says of itself; readers check it."""

    mode: CacheMode
    vocab_size: int
    top_k: int
    dtype: str
    skipped: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()


def compute_shards(
    work: Path, plan: Sequence[Sequence[str]], compute: Callable[[Sequence[str]], list[TeacherTargets]]
) -> list[Path]:
    """Compute one shard for each list of example ids; shards that an earlier attempt finished are kept.

    `compute` returns one `TeacherTargets` per example and must depend on nothing but its argument, so that a
    resumed build equals an undisturbed one bit for bit.
    """
    paths = [work / f"shard-{number:05d}.safetensors" for number in range(len(plan))]
    for number, (path, ids) in enumerate(zip(paths, plan, strict=True)):
        if _finished(path, ids):
            continue
        targets = TeacherTargets.join(compute(ids))
        answer_tokens = [token for answer in targets.answers for token in answer]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in targets.tensors.items()}
        tensors["answer_ids"] = torch.tensor(answer_tokens, dtype=torch.int32)
        lengths = [len(answer) for answer in targets.answers]
        # One entry: safetensors writes several in any order, and equal shards must be equal files.
        metadata = {"examples": json.dumps([list(ids), lengths, _digest(tensors)])}
        atomic_write_bytes(path, save(tensors, metadata))
        logger.info("teacher cache: shard %d of %d, %d answer tokens", number + 1, len(plan), len(answer_tokens))
    return paths


def publish_cache(
    output: Path, shards: Sequence[Path], facts: CacheFacts, head: OutputHead | None, record: RunRecord
) -> None:
    """Put finished shards, the index and the teacher's head (mode hidden) into `output`, whole or not at all."""
    with staged_directory(output) as staging:
        examples: dict[str, tuple[int, int, int, int]] = {}
        nll = torch.zeros((), dtype=torch.float64)
        for number, shard in enumerate(shards):
            link_or_copy(shard, staging / shard.name)
            with safe_open(shard, framework="pt") as tensors:
                ids, lengths, _ = json.loads(tensors.metadata()["examples"])
                if facts.mode == "top_k":
                    rows = tensors.get_tensor("log_partition").double() - tensors.get_tensor("gold_logit").double()
                    nll += rows.nansum()
            starts = accumulate(lengths, initial=0)
            for place, (identity, length, start) in enumerate(zip(ids, lengths, starts, strict=False)):
                examples[identity] = (number, start + place, start, length)
        if head is not None:
            tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            atomic_write_bytes(staging / HEAD_FILE, save(plain))
        answer_tokens = sum(length for *_, length in examples.values())
        shard_names = [shard.name for shard in shards]
        write_json(staging / INDEX_FILE, {**vars(facts), "shards": shard_names, "examples": examples})
        write_manifest(staging)
        # The record is outside the manifest: it holds times, and the digest of the same targets must not change.
        record.add(examples=len(examples), answer_tokens=answer_tokens, skipped=len(facts.skipped))
        if facts.mode == "top_k":
            record.add(teacher_gold_nll_per_token=nll.item() / answer_tokens)
        record.write(staging / "run.json")
    # A link is the same file: left behind, damage to the cache would come back when the cache is made again.
    for shard in shards:
        shard.unlink()


class TargetCache:
    """Memory-mapped reader of a cache.

    Raises UserError on opening where a file is missing or corrupt (it is named).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        verify_manifest(directory)
        index: dict[str, Any] = read_json(directory / INDEX_FILE)
        self._examples: dict[str, tuple[int, int, int, int]] = index.pop("examples")
        self._shard_names: list[str] = index.pop("shards")
        index |= {name: tuple(index[name]) for name in ("skipped", "reserved")}
        self.facts = CacheFacts(**index)
        self._shards: dict[int, Any] = {}

    @property
    def example_ids(self) -> frozenset[str]:
        """The examples that have targets."""
        return frozenset(self._examples)

    def targets(self, example_ids: Iterable[str]) -> TeacherTargets:
        """The targets of these examples, in order, on the CPU."""
        return TeacherTargets.join([self._read(identity) for identity in example_ids])

    @cached_property
    def head(self) -> OutputHead | None:
        """The teacher's output embeddings; None in mode top_k."""
        return OutputHead(**load_file(self.directory / HEAD_FILE)) if self.facts.mode == "hidden" else None

    def _read(self, identity: str) -> TeacherTargets:
        if identity not in self._examples:
            raise UserError(
                f"{self.directory}: has no targets for example {identity}: it was built from other data; "
                "delete it and run the same command again"
            )
        number, row, answer_start, length = self._examples[identity]
        path = self.directory / self._shard_names[number]
        try:
            if number not in self._shards:
                self._shards[number] = safe_open(path, framework="pt")
            shard = self._shards[number]
            answer = shard.get_slice("answer_ids")[answer_start : answer_start + length]
            names = [name for name in shard.keys() if name != "answer_ids"]  # noqa: SIM118 (not a dict)
            rows = {name: shard.get_slice(name)[row : row + length + 1] for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}): delete {self.directory} and run the same command again"
            ) from error
        return TeacherTargets((tuple(answer.tolist()),), **rows)


def _finished(path: Path, ids: Sequence[str]) -> bool:
    try:
        with safe_open(path, framework="pt") as shard:
            found, _, sha256 = json.loads(shard.metadata()["examples"])
        return found == list(ids) and sha256 == _digest(load_file(path))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over the tensors' bytes: a shard of an earlier attempt has no manifest yet."""
    hasher = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        hasher.update(tensor.view(torch.uint8).numpy().data)
    return hasher.hexdigest()
