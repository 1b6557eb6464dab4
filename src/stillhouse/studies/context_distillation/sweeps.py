"""The study's sweeps by what validation says of their points; `figures` draw them and `report` tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.reporting.sweeps import Score, Sweeps, grids
from stillhouse.studies.context_distillation.results import Evaluation


def sweeps(evaluations: Sequence[Evaluation]) -> Sweeps:
    """Every sweep of the study, by the gold answers' NLL on validation."""
    scores = (
        Score(one.results.model, measured.condition, measured.seed, measured.gold_nll.value)
        for one in evaluations
        for measured in one.results.headline("validation")
    )
    return Sweeps("context_distillation", "Gold NLL on validation (nats per token)", grids(scores))
