"""Micro-batches made ahead are those that would be made in place, and training on them is the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from stillhouse.training import loop
from stillhouse.training.loading import Loader, Make
from tests.training.tiny_run import tiny_settings, tiny_train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Named:
    """A micro-batch that says which one it is."""

    name: tuple[int, int, int]
    tokens: int = 7

    def to(self, device: torch.device) -> Named:
        return self


def made(step: int, token_budget: int) -> list[Named]:
    """Of steps 1, 2, ... two, none, one, two, ..."""
    return [Named((step, token_budget, number)) for number in range((2, 0, 1)[(step - 1) % 3])]


class InPlace(Loader):
    """The naive form."""

    def micro_batches(self, step: int, token_budget: int) -> Iterator[tuple[Any, int]]:
        for batch in self.make(step, token_budget):
            yield batch, batch.tokens


class Ahead(Loader):
    """The form for GPUs."""

    def __init__(self, make: Make, last: int, device: torch.device, *, ahead: bool) -> None:
        super().__init__(make, last, device, ahead=True)


both_ways = pytest.mark.parametrize("ahead", [True, False])


@both_ways
def test_what_is_made_ahead_is_what_would_be_made_in_place(ahead: bool) -> None:
    asked = [(1, 10), (2, 10), (3, 10), (4, 10), (4, 5), (5, 5), (6, 5), (6, 5), (7, 5)]
    with closing(Loader(made, 7, CPU, ahead=ahead)) as loader:
        for step, budget in asked:
            assert list(loader.micro_batches(step, budget)) == [(batch, 7) for batch in made(step, budget)]


@both_ways
def test_an_update_that_is_left_in_its_middle_begins_again_from_the_first(ahead: bool) -> None:
    with closing(Loader(made, 4, CPU, ahead=ahead)) as loader:
        assert next(loader.micro_batches(1, 10))[0].name == (1, 10, 0)
        assert [batch.name for batch, _ in loader.micro_batches(1, 10)] == [(1, 10, 0), (1, 10, 1)]
        assert [batch.name for batch, _ in loader.micro_batches(3, 10)] == [(3, 10, 0)]


def test_the_next_one_is_made_while_one_is_learned_from() -> None:
    events = {batch.name: Event() for step in (1, 3) for batch in made(step, 10)}

    def make(step: int, token_budget: int) -> Iterable[Named]:
        for batch in made(step, token_budget):
            events[batch.name].set()
            yield batch

    with closing(Loader(make, 3, CPU, ahead=True)) as loader:
        first_update = loader.micro_batches(1, 10)
        next(first_update)
        assert events[1, 10, 1].wait(10) and not events[3, 10, 0].is_set()
        next(first_update)
        assert events[3, 10, 0].wait(10), "the first of the next update is made before this one ends"


@both_ways
def test_an_error_is_raised_where_its_micro_batch_is_asked_for(ahead: bool) -> None:
    def make(step: int, token_budget: int) -> Iterable[Named]:
        if step == 3:
            raise ValueError("shard 5 is damaged")
        return made(step, token_budget)

    with closing(Loader(make, 3, CPU, ahead=ahead)) as loader:
        assert len(list(loader.micro_batches(1, 10))) == 2
        assert list(loader.micro_batches(2, 10)) == []
        with pytest.raises(ValueError, match="shard 5"):
            list(loader.micro_batches(3, 10))


@pytest.mark.parametrize("form", [Loader, Ahead])
def test_training_is_bit_equal_to_micro_batches_made_in_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: type[Loader]
) -> None:
    """With dropout: a thread that drew from the global generators would change it."""
    settings = tiny_settings(steps=4, lora={"rank": 4, "dropout": 0.2}, micro_batch_tokens=150)
    monkeypatch.setattr(loop, "Loader", form)
    found, _ = tiny_train(tiny_model, tmp_path / "found", settings)
    monkeypatch.setattr(loop, "Loader", InPlace)
    in_place, _ = tiny_train(tiny_model, tmp_path / "in_place", settings)
    for (name, left), right in zip(found.named_parameters(), in_place.parameters(), strict=True):
        assert torch.equal(left, right), name
