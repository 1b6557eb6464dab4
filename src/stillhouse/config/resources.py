"""What a job asks of the machine; never part of a result, so a change here reruns nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class JobResources(StrictModel):
    """The request of one kind of job."""

    gpus: Annotated[int, Field(ge=1, description="GPUs on a machine that has any; ignored on a CPU.")] = 1
    threads: Annotated[int, Field(ge=1)] = 2
    memory_mb: Annotated[int, Field(ge=256)] = 8000
    runtime_minutes: Annotated[int, Field(ge=1)] = 240


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
