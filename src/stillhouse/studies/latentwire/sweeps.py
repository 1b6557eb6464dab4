"""The study's sweeps by what validation says of their points; `figures` draw them and `report` tells of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stillhouse.reporting.sweeps import Score, Sweeps, grids
from stillhouse.studies.latentwire.results import Evaluation


def sweeps(evaluations: Sequence[Evaluation]) -> Sweeps:
    """Every sweep of the study, by the gold answer's NLL on validation, the mean over readers.

    None where checkpoints were chosen on the test split: validation was not scored then.
    """
    scores = []
    for one in evaluations:
        for selection in one.results.selections:
            key = (selection.condition, selection.seed, selection.step)
            read = [
                measured.gold_nll.value
                for reader in one.results.reader_names
                for measured in one.results.of("latent", reader, "validation")
                if (measured.condition, measured.seed, measured.step) == key and measured.gold_nll
            ]
            if read:
                scores.append(Score(one.results.pair, selection.condition, selection.seed, float(np.mean(read))))
    return Sweeps("latentwire", "Gold answer NLL on validation (nats per token)", grids(scores))
