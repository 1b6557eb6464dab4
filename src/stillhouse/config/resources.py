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
            description="Processor threads. Without GPUs the trainings and teacher caches of a study run side by side, "
            "each on fewer.",
        ),
    ] = 2
    memory_mb: Annotated[int, Field(ge=256)] = 8000
    runtime_minutes: Annotated[int, Field(ge=1)] = 240

    def threads_of_one(self, jobs: int, processors: int, machine_mb: int) -> int:
        """The threads of one of so many `jobs` on a machine without GPUs.

        Small models gain little from a second thread, so all jobs run at once if they can; but so many that they fill
        the machine's memory (`machine_mb`) also fill its processors.
        """
        share_of_memory = math.ceil(processors * self.memory_mb / machine_mb)
        return min(processors, max(1, share_of_memory, min(self.threads, processors // max(1, jobs))))


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
