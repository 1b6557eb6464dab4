"""Settings of evaluation engines and greedy or sampled generation, shared by every study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

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

    def spreading_objection(self, model: str, config: Mapping[str, Any]) -> str | None:
        """Why vLLM cannot spread a model of this `config.json` over `tensor_parallel` GPUs; None where it can."""
        config = config.get("text_config", config)
        heads = config.get("num_attention_heads")
        if self.kind == "transformers" or not heads:
            return None
        key_heads = config.get("num_key_value_heads") or heads

        def divides(gpus: int) -> bool:  # Of fewer key-value heads than GPUs each is kept by as many GPUs as another.
            return heads % gpus == 0 and max(key_heads, gpus) % min(key_heads, gpus) == 0

        if divides(self.tensor_parallel):
            return None
        fitting = next(gpus for gpus in range(self.tensor_parallel, 0, -1) if divides(gpus))
        return (
            f"is {self.tensor_parallel}, among which the {heads} attention heads ({key_heads} of keys and values) of "
            f"model '{model}' cannot be divided: set it and resources.evaluation.gpus to {fitting}"
        )


class GenerationSettings(StrictModel):
    """How an answer is decoded; temperature 0 is greedy."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
