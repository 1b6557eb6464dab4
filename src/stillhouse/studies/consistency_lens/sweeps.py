"""The study's sweeps by what validation says of their points; `figures` draw them and `report` tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.reporting.sweeps import Score, Sweeps, grids
from stillhouse.studies.consistency_lens.results import Evaluation


def sweeps(evaluations: Sequence[Evaluation]) -> Sweeps:
    """Every sweep of the study, by the lens's KL on validation documents."""
    scores = (
        Score(one.results.model, measured.condition, measured.seed, measured.kl.value)
        for one in evaluations
        for measured in one.results.chosen("validation")
    )
    return Sweeps("consistency_lens", "KL on validation documents (nats)", grids(scores))
