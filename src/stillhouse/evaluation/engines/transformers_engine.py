"""The transformers engine: for models that vLLM does not serve and machines without it.

Prompts are sorted by length and decoded in left-padded batches with a KV cache. Adapters are loaded once through
peft and switched between calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines.base import Completion, log_speed
from stillhouse.evaluation.engines.checks import (
    check_prompt_lengths,
    context_length,
    cut_at_stop,
    stop_token_ids,
)
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.runtime.errors import UserError


class TransformersEngine:
    """`GenerationEngine` on transformers' `generate`."""

    def __init__(
        self,
        model_directory: Path,
        settings: EngineSettings,
        adapters: Sequence[Path] = (),
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model and every adapter; UserError for an adapter that does not fit the model."""
        self._tokenizer: Any = load_tokenizer(model_directory, trust_remote_code)
        self._stop_ids = stop_token_ids(model_directory, self._tokenizer)
        self._limit = context_length(model_directory, settings)
        self._batch_size = settings.batch_size
        self._model: Any = load_model(model_directory, settings.precision, trust_remote_code=trust_remote_code)
        # The model's own sampling defaults (temperature, repetition penalty) must not leak into an evaluation.
        self._model.generation_config = GenerationConfig()
        self._names = {path.resolve(): f"adapter-{number}" for number, path in enumerate(adapters, start=1)}
        for path, name in self._names.items():
            self._load_adapter(path, name)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        adapter: Path | None = None,
        description: str = "",
    ) -> list[Completion]:
        """Complete the prompts; see `GenerationEngine`. Samples depend on the seed and on the batch size."""
        check_prompt_lengths(prompts, settings, self._limit, description)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        completions: dict[int, Completion] = {}
        started = time.monotonic()
        with self._using(adapter), torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(settings.seed)
            for batch in tqdm(batches, desc=description or "generation", unit="batch", disable=None):
                answers = self._generate_batch([prompts[index] for index in batch], settings)
                completions.update(zip(batch, answers, strict=True))
        in_order = [completions[index] for index in range(len(prompts))]
        log_speed(in_order, time.monotonic() - started, description)
        return in_order

    def close(self) -> None:
        """Drop the model."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _generate_batch(self, prompts: list[Sequence[int]], settings: GenerationSettings) -> list[Completion]:
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self._stop_ids[0] if self._stop_ids else 0)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        output = self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=attention_mask.to(self._model.device),
            generation_config=self._generation_config(settings),
        )
        return [self._completion(row) for row in output[:, longest:].tolist()]

    def _generation_config(self, settings: GenerationSettings) -> GenerationConfig:
        stop_ids = list(self._stop_ids)
        decoding: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            # top_k 0: transformers would otherwise silently keep 50 candidates.
            decoding = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
            **decoding,
        )

    def _completion(self, generated: list[int]) -> Completion:
        token_ids, finished = cut_at_stop(generated, self._stop_ids)
        return Completion(token_ids, self._tokenizer.decode(token_ids, skip_special_tokens=True), finished)

    def _load_adapter(self, path: Path, name: str) -> None:
        try:
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(path), adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(path), adapter_name=name)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{path}: the adapter does not fit this model: {reason}") from error
        self._model.eval()

    @contextmanager
    def _using(self, adapter: Path | None) -> Iterator[None]:
        if adapter is not None:
            if (name := self._names.get(adapter.resolve())) is None:
                raise ValueError(f"the engine was not opened with adapter {adapter}")
            self._model.set_adapter(name)
            yield
        elif isinstance(self._model, PeftModel):
            with self._model.disable_adapter():
                yield
        else:
            yield
