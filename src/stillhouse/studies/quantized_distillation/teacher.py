"""Step program: the teacher's final hidden states on the data set's answers, computed once for all runs that agree."""

from __future__ import annotations

from pathlib import Path

from stillhouse.config.base import StrictModel
from stillhouse.studies.quantized_distillation.config import CacheSettings


class TeacherStep(StrictModel):
    """The step's command line."""

    model: Path
    data: Path
    output: Path
    work: Path
    cache: CacheSettings
    trust_remote_code: bool = False
