"""What the lens learns from: one token of each document, with its activation where that was extracted.

Two artefacts hold the examples, both in the form of `shards`: `tokens` writes every document's tokens, `activations`
adds `positions` [documents] and `activations` [documents, hidden]. A document gives one example. Batches stop at the
chosen position: a causal model cannot see what comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.records import data_digest
from stillhouse.runtime.seeds import derived_seed, generator
from stillhouse.studies.consistency_lens.run_settings import ActivationSettings, PositionSettings
from stillhouse.studies.consistency_lens.shards import Shards


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


class CachedExamples:
    """The examples of an activation artefact.

    Raises `UserError` for a corrupt shard, or for activations of another model, layer or position policy.
    """

    def __init__(self, directory: Path, split: str, settings: ActivationSettings, model: Path) -> None:
        self.shards = Shards(directory, split)
        check_origin(self.shards, settings, model)

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
    """The same examples without activations, from a token artefact: the training step computes them.

    Documents that are too short for the position policy are left out. Raises `UserError` where none is long enough,
    for a corrupt shard, or for tokens of another model.
    """

    def __init__(self, directory: Path, split: str, settings: ActivationSettings, model: Path) -> None:
        self.shards, self.settings = Shards(directory, split), settings
        check_origin(self.shards, None, model)
        lengths = self.shards.lengths().clamp(max=settings.max_length)
        needed = settings.positions.minimum + 2  # the chosen token has a successor
        self.documents: list[int] = (lengths >= needed).nonzero()[:, 0].tolist()
        if not self.documents:
            raise UserError(
                f"{directory}: no document of split '{split}' has the {needed} tokens that positions.minimum "
                f"({settings.positions.minimum}) needs (the longest has {int(lengths.max())}): lower "
                "positions.minimum, raise max_length or take longer texts"
            )

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        document = self.documents[index]
        tokens = self.shards.token_ids(document)[: self.settings.max_length]
        identity = self.shards.document_id(document)
        return Example(identity, tokens, choose_position(len(tokens), self.settings.positions, identity))


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


def choose_position(length: int, positions: PositionSettings, document_id: str) -> int:
    """The index of the chosen token in a document of `length` tokens.

    `midpoint`: half way between the minimum and the last token, as published. `random`: uniform from the minimum to
    the last token but one, by the seed and the document's id, so that it depends on nothing else.
    """
    if positions.policy == "midpoint":
        return (positions.minimum + length - 1) // 2
    choices = length - 1 - positions.minimum
    return positions.minimum + derived_seed(positions.seed, "position", document_id) % choices


def origin(model: Path) -> dict[str, str]:
    """What an artefact's manifest says of the model behind it."""
    return {"model": model.name, "model_digest": data_digest(model)}


def check_origin(shards: Shards, settings: ActivationSettings | None, model: Path) -> None:
    """Refuse an artefact of another model; with `settings`, activations of another layer or position policy too."""
    expected: dict[str, Any] = origin(model)
    if settings is not None:
        expected |= settings.model_dump(mode="json", include={"layer", "positions"})
    for name, value in expected.items():
        found = shards.facts.get(name)
        if name != "model" and found != value:
            raise UserError(
                f"{shards.directory}: is of {name} {found} (model {shards.facts.get('model')}), but this run explains "
                f"{name} {value} (model {model.name}): give it its own, or correct the settings"
            )


def _stack(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    activations = [example.activation for example in examples if example.activation is not None]
    return *pad_contexts(examples), torch.stack(activations) if activations else None
