"""What a job asks of the machine; never part of a result, so a change here reruns nothing."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class JobResources(StrictModel):
    """The request of one kind of job."""

    gpus: Annotated[int, Field(ge=1, description="GPUs on a machine that has any; ignored on a CPU.")] = 1
    threads: Annotated[
        int,
        Field(
            ge=1,
            description="Processor threads. Without GPUs, trainings and teacher caches run side by side instead, each "
            "on the share of the processors that memory_mb is of the machine's memory.",
        ),
    ] = 2
    memory_mb: Annotated[int, Field(ge=256)] = 8000
    runtime_minutes: Annotated[int, Field(ge=1)] = 240

    def share_of(self, processors: int, memory_mb: int) -> int:
        """Threads of one of many such jobs on a machine without GPUs: side by side they exceed neither of the two."""
        return min(processors, max(1, math.ceil(processors * self.memory_mb / memory_mb)))


class ResourceSettings(StrictModel):
    """Requests by kind of job."""

    training: JobResources = JobResources()
    teacher_cache: JobResources = JobResources()
    evaluation: JobResources = JobResources()
    assets: JobResources = JobResources(runtime_minutes=120)
    gpu_hour_price: Annotated[
        float,
        Field(ge=0, description="Price of one GPU hour, for the cost column of results.md; 0 leaves it out."),
    ] = 0.0
    currency: str = "USD"
