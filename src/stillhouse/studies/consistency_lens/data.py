"""What the lens learns from: one token of each document, with its activation where that was extracted.

Two artefacts hold the examples, both as sharded safetensors that are memory-mapped and never read whole:

    tokens/       manifest.json  <split>-00000.safetensors ...   token_ids [sum of lengths], offsets [documents + 1]
    activations/  manifest.json  <split>-00000.safetensors ...   the same, and positions [documents],
                                                                 activations [documents, hidden]

`tokens` writes the first, `activations` the second; the metadata of each shard names its documents. A document gives
one example. Readers stop at the chosen position: a causal model cannot see what comes after it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.runtime.seeds import derived_seed, generator

if TYPE_CHECKING:
    from stillhouse.studies.consistency_lens.config import PositionSettings

OPEN_SHARDS = 64


@dataclass(frozen=True)
class Example:
    """One token of a document.

    token_ids: [tokens], the document up to its length limit. position: index of the chosen token.
    activation: [hidden] fp32, None where the training step computes it.
    """

    document_id: str
    token_ids: Tensor
    position: int
    activation: Tensor | None = None


@dataclass(frozen=True)
class ActivationBatch:
    """Examples and, for the resample term, a partner from another document for each.

    input_ids, attention_mask: [batch, tokens], each document up to its chosen token, padded on the right.
    positions: [batch], column of the chosen token. activations: [batch, hidden] fp32, None where the step computes
    them. other_*: the same of the partners.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    activations: Tensor | None
    other_input_ids: Tensor
    other_attention_mask: Tensor
    other_positions: Tensor
    other_activations: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens of the examples and their partners, padding not counted."""
        return int(self.attention_mask.sum() + self.other_attention_mask.sum())

    def to(self, device: torch.device) -> ActivationBatch:
        """The same batch with its tensors on `device`."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        moved: dict[str, Any] = {name: value.to(device) for name, value in values if value is not None}
        return replace(self, **moved)


class Examples(Protocol):
    """Examples by index; reading one touches only its own rows on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Shards:
    """Memory-mapped rows of one split, over all of its shards; opening checks every file of the artefact.

    Raises `UserError` that names a missing or corrupt file, or a split that the artefact does not hold.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self.directory = directory
        self.manifest = verify_manifest(directory)
        counts: dict[str, int] = self.manifest.get("splits", {}).get(split, {})
        if not counts:
            raise UserError(f"{directory}: holds no split '{split}': make it again")
        self._paths = [directory / name for name in counts]
        self._ends = list(accumulate(counts.values()))
        # Open files are bounded: a corpus may have thousands of shards.
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, name: str, index: int) -> Tensor:
        """Row `index` of a tensor with one row a document."""
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
        return str(self._open(shard)[1][place])

    def lengths(self) -> Tensor:
        """The number of tokens of every document, [documents]."""
        ends = [0, *self._ends]
        shards = range(len(self._paths))
        return torch.cat([self._slice(i, "offsets", 0, ends[i + 1] - ends[i] + 1).diff() for i in shards])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _open_shard(self, shard: int) -> tuple[Any, list[str]]:
        tensors = safe_open(self._paths[shard], framework="pt")
        return tensors, json.loads(tensors.metadata()["documents"])

    def _slice(self, shard: int, name: str, start: int, end: int) -> Tensor:
        try:
            rows: Tensor = self._open(shard)[0].get_slice(name)[start:end]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._paths[shard]}: cannot be read ({error}): delete {self.directory} and run the same command again"
            ) from error
        return rows


class CachedExamples:
    """The examples of an activation artefact."""

    def __init__(self, directory: Path, split: str) -> None:
        self.shards = Shards(directory, split)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Example:
        return Example(
            self.shards.document_id(index),
            self.shards.token_ids(index),
            int(self.shards.row("positions", index)),
            self.shards.row("activations", index).float(),
        )


class TokenExamples:
    """The same examples without activations, from pre-tokenised text: the training step computes them.

    Documents that are too short for the position policy are left out, as extraction leaves them out. Raises
    `UserError` where none is long enough.
    """

    def __init__(self, directory: Path, split: str, positions: PositionSettings, max_length: int) -> None:
        self.shards, self.positions, self.max_length = Shards(directory, split), positions, max_length
        lengths = self.shards.lengths().clamp(max=max_length)
        self.documents: list[int] = (lengths >= shortest_document(positions)).nonzero()[:, 0].tolist()
        if not self.documents:
            raise UserError(
                f"{directory}: no document of split '{split}' has the {shortest_document(positions)} tokens that "
                f"positions.minimum ({positions.minimum}) needs (the longest has {int(lengths.max())}): lower "
                "positions.minimum, raise max_length or take longer texts"
            )

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        document = self.documents[index]
        tokens = self.shards.token_ids(document)[: self.max_length]
        identity = self.shards.document_id(document)
        return Example(identity, tokens, choose_position(len(tokens), self.positions, identity))


class ActivationData:
    """Examples as the training loop takes them, each with a partner from another document that the seed fixes."""

    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples = examples
        self.partners = draw_partners(len(examples), seed)

    def __len__(self) -> int:
        return len(self.examples)

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[ActivationBatch]:
        """The examples of `indices`, in order, at most `token_budget` tokens at a time.

        Counted are the rectangles of the examples and of their partners, padding included.
        """
        group: list[tuple[Example, Example]] = []
        longest = 0
        for index in indices:
            pair = self.examples[index], self.examples[self.partners[index]]
            width = max(longest, *(example.position + 1 for example in pair))
            if group and 2 * width * (len(group) + 1) > token_budget:
                yield collate(group)
                group, width = [], max(example.position + 1 for example in pair)
            group.append(pair)
            longest = width
        if group:
            yield collate(group)


def collate(pairs: Sequence[tuple[Example, Example]]) -> ActivationBatch:
    """The batch of examples and their partners, on the CPU."""
    ours, others = zip(*pairs, strict=True)
    return ActivationBatch(*_stack(ours), *_stack(others))


def pad_contexts(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Each document up to its chosen token: input_ids and attention_mask [batch, tokens], positions [batch]."""
    positions = torch.tensor([example.position for example in examples])
    mask = torch.arange(int(positions.max()) + 1) <= positions[:, None]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, : example.position + 1] = example.token_ids[: example.position + 1]
    return input_ids, mask.long(), positions


def draw_partners(count: int, seed: int) -> list[int]:
    """For each example the index of another one: neighbours in a shuffled ring, so nobody meets itself.

    Raises `UserError` for a single example, which has no other.
    """
    if count < 2:
        raise UserError("the lens needs at least two documents: an example's partner comes from another one")
    ring = torch.randperm(count, generator=generator(seed, "partners"))
    partners = torch.empty_like(ring)
    partners[ring] = ring.roll(1)
    return list(partners.tolist())


def shortest_document(positions: PositionSettings) -> int:
    """The fewest tokens that a document needs for its chosen token to be at `positions.minimum` or later."""
    return 2 * positions.minimum if positions.policy == "midpoint" and positions.minimum else positions.minimum + 2


def choose_position(length: int, positions: PositionSettings, document_id: str) -> int:
    """The index of the chosen token in a document of `length` tokens.

    `midpoint`: length // 2, as published. `random`: uniform from the minimum to the last token that has a
    successor, by the seed and the document's id, so that it depends on nothing else.
    """
    if positions.policy == "midpoint":
        return length // 2
    choices = length - 1 - positions.minimum
    return positions.minimum + derived_seed(positions.seed, "position", document_id) % choices


def open_examples(
    directory: Path, split: str, positions: PositionSettings | None = None, max_length: int | None = None
) -> Examples:
    """The examples of an activation artefact, or of a token artefact with the position policy to apply."""
    if positions is None or max_length is None:
        return CachedExamples(directory, split)
    return TokenExamples(directory, split, positions, max_length)


def check_origin(directory: Path, expected: dict[str, Any]) -> None:
    """Refuse activations of another model, layer, position policy or length: `UserError` names what differs."""
    facts = read_json(directory / "manifest.json").get("facts", {})
    for name, value in expected.items():
        if facts.get(name) != value:
            raise UserError(
                f"{directory}: its activations are of {name} {facts.get(name)!r}, this run needs {value!r}: "
                "give the directory of this run's own activations"
            )


def _stack(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    activations = [example.activation for example in examples if example.activation is not None]
    return *pad_contexts(examples), torch.stack(activations) if activations else None
