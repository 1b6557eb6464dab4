"""The study's sweeps by what validation says of their points; `figures` draw them and `report` tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.reporting.sweeps import Score, Sweeps, grids
from stillhouse.studies.quantized_distillation.results import QuantizedEvaluation


def sweeps(evaluations: Sequence[QuantizedEvaluation]) -> Sweeps:
    """Every sweep of the study, by KL to the teacher on validation."""
    scores = (
        Score(one.results.model, system.condition, system.seed, system.validation_kl)
        for one in evaluations
        for system in one.results.systems
        if system.validation_kl is not None
    )
    return Sweeps("quantized_distillation", "KL from the teacher on validation (nats per token)", grids(scores))
