"""Step program: train one student and keep its adapters.

`python -m stillhouse.studies.quantized_distillation.train` with the leaves of `TrainStep`. The output directory holds
`checkpoint-<step>/` (peft adapters), `metrics.jsonl` (rows of saved steps have validation_kl, validation_agreement
and perplexity), `run.json` (`validation.before` and `validation.teacher` hold the same three) and a manifest.
"""

from __future__ import annotations

from pathlib import Path

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.studies.quantized_distillation.config import RunSettings


class TrainStep(StrictModel):
    """The step's command line. text: the data set (not its split) whose perplexity is followed."""

    model: Path
    data: Path
    cache: Path | None = None
    text: Path
    output: Path
    work: Path
    condition: str
    seed: int
    run: RunSettings
    tracking: TrackingSettings
    trust_remote_code: bool
