"""The study's sweeps by what validation says of their points; `figures` draw them and `report` tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.reporting.sweeps import Score, Sweeps, grids
from stillhouse.studies.lora_generation.results import Evaluation


def sweeps(evaluations: Sequence[Evaluation]) -> Sweeps:
    """Every sweep of the study, by the loss on validation shards; none where no shard is for validation."""
    scores = (
        Score(one.results.model, chosen.condition, chosen.seed, chosen.validation_loss)
        for one in evaluations
        for chosen in one.results.selections
        if chosen.validation_loss is not None
    )
    return Sweeps("lora_generation", "Loss on validation shards", grids(scores))
