"""Step program: merge a student's selected adapter, convert the weights for real, check that they reload.

Without a student the base itself is converted: `ptq`, round to nearest. `run.json` names the checkpoint and the
largest difference of logits between the fake-quantised and the reloaded model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import Precision


class ExportStep(StrictModel):
    """The step's command line. student: a training's output directory; None: the base, rounded to nearest."""

    model: Path
    student: Path | None = None
    output: Path
    format: WeightFormat
    selection: Literal["validation_kl", "last"] = "validation_kl"
    precision: Precision = "auto"
    trust_remote_code: bool = False
