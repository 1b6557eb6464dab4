"""What a generation engine is, and which one serves a model.

An engine loads one model once and answers for all of its adapters: pass every checkpoint to `open_engine`, then
name one in each `generate`. A fully fine-tuned checkpoint is a model directory of its own and gets its own engine.
Prompts are token ids, rendered by the caller, so that both engines read exactly the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines.checks import check_adapter
from stillhouse.models.loading import check_weights
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger


@dataclass(frozen=True)
class Completion:
    """One generated answer; the stop token is not part of it.

    `finished` tells that the model ended its answer itself, rather than being cut at `max_new_tokens`.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool


class GenerationEngine(Protocol):
    """One loaded model with its adapters; use with `contextlib.closing`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        adapter: Path | None = None,
        description: str = "",
    ) -> list[Completion]:
        """Complete each prompt (token ids), in order, with the adapter or with the plain model.

        `description` names the work in log lines and errors. Raises UserError for a prompt that leaves no room
        for `max_new_tokens`, and ValueError for an adapter that the engine was not opened with.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""
        ...


def open_engine(
    model_directory: Path,
    settings: EngineSettings,
    adapters: Sequence[Path] = (),
    *,
    servable_by_vllm: bool = True,
    trust_remote_code: bool = False,
) -> GenerationEngine:
    """Load a model and its LoRA adapters with the engine that `settings.kind` names or that `auto` finds fit.

    Every file is checked first: a missing or corrupt model, adapter or configuration is a UserError naming it.
    The log says which engine was taken and why.
    """
    check_weights(model_directory)
    for adapter in adapters:
        check_adapter(adapter)
    kind, reason = choose_engine(model_directory, settings, adapters, servable_by_vllm=servable_by_vllm)
    logger.info("engine for %s: %s (%s)", model_directory, kind, reason)
    if kind == "vllm":
        from stillhouse.evaluation.engines.vllm_engine import VllmEngine

        return VllmEngine(model_directory, settings, adapters, trust_remote_code=trust_remote_code)
    from stillhouse.evaluation.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model_directory, settings, adapters, trust_remote_code=trust_remote_code)


def choose_engine(
    model_directory: Path, settings: EngineSettings, adapters: Sequence[Path], *, servable_by_vllm: bool
) -> tuple[Literal["vllm", "transformers"], str]:
    """The engine to take and the reason in words.

    Raises UserError where `engine.kind` is vllm and vLLM cannot serve.
    """
    if settings.kind == "transformers":
        return "transformers", "configured"
    from stillhouse.evaluation.engines.vllm_engine import objection

    problem = (
        objection(model_directory, adapters)
        if servable_by_vllm
        else "the catalogue says that vLLM does not serve this model"
    )
    if problem is None:
        return "vllm", "configured" if settings.kind == "vllm" else "installed and serves this model"
    if settings.kind == "vllm":
        raise UserError(f"engine.kind is vllm, but {problem}: set engine.kind to auto or transformers")
    return "transformers", problem


def log_speed(completions: Sequence[Completion], seconds: float, description: str) -> None:
    """One log line on a finished `generate`."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    work = description or "generation"
    rate = tokens / max(seconds, 1e-9)
    logger.info(f"{work}: {len(completions)} answers, {tokens} tokens, {seconds:.1f} s, {rate:.0f} tokens/s")
