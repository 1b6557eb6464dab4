"""Settings of evaluation engines and greedy or sampled generation, shared by every study."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.config.training import Precision


class EngineSettings(StrictModel):
    """Which engine generates: `auto` takes vLLM where it is installed and serves the model."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    precision: Precision = "auto"
    batch_size: Annotated[int, Field(ge=1, description="Sequences decoded at once.")] = 64
    max_model_length: Annotated[int, Field(ge=16, description="Prompt and answer, in tokens.")] = 4096
    kv_cache_gib: Annotated[float, Field(gt=0, description="KV cache of vLLM on a CPU, in GiB.")] = 2.0
    gpu_memory_fraction: Annotated[float, Field(gt=0, lt=1, description="Share of a GPU that vLLM takes.")] = 0.85
    tensor_parallel: Annotated[int, Field(ge=1)] = 1


class GenerationSettings(StrictModel):
    """How an answer is decoded; temperature 0 is greedy."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
