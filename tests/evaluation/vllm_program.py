"""Opens vLLM engines in a process of their own, as an evaluation step does, and writes their answers as JSON.

Two engines one after the other: a model with its adapters, then a fully fine-tuned checkpoint.
Usage: python -m tests.evaluation.vllm_program REQUEST.json ANSWERS.json
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine, vllm_engine
from stillhouse.runtime.files import read_json, write_json
from stillhouse.runtime.logs import configure_logging


def main() -> None:
    """Answer the request's prompts with each engine and adapter."""
    configure_logging()
    request = read_json(Path(sys.argv[1]))
    settings = EngineSettings(kind="auto", precision="fp32", max_model_length=128, kv_cache_gib=0.05)
    greedy = GenerationSettings(max_new_tokens=request["max_new_tokens"])
    if request["tensor_parallel"] > 1:
        spread_over_processes(request["tensor_parallel"])
    adapters = [Path(name) for name in request["adapters"]]
    answers = {}
    with closing(open_engine(Path(request["model"]), settings, adapters)) as engine:
        for name, adapter in [("base", None), *((str(path), path) for path in adapters), ("base again", None)]:
            answers[name] = [asdict(item) for item in engine.generate(request["prompts"], greedy, adapter, name)]
        sampled = greedy.model_copy(update={"temperature": 1.0})
        same = [engine.generate(request["prompts"], sampled) for _ in range(2)]
        answers["sampled"], answers["sampled again"] = ([asdict(item) for item in run] for run in same)
    with closing(open_engine(Path(request["full_checkpoint"]), settings)) as engine:
        answers["full"] = [asdict(item) for item in engine.generate(request["prompts"], greedy)]
        assert isinstance(engine, vllm_engine.VllmEngine)
        processes = engine._llm.llm_engine.vllm_config.parallel_config.world_size
    write_json(Path(sys.argv[2]), {"processes": processes, "answers": answers})


def spread_over_processes(count: int) -> None:
    """Let vLLM spread models over processes of the CPU, as it spreads them over GPUs; Stillhouse itself never does."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    of_one_process = vllm_engine._device_options

    def of_many(settings: EngineSettings, model_directory: Path) -> dict[str, object]:
        spread = {"tensor_parallel_size": count, "distributed_executor_backend": "mp"}
        return of_one_process(settings, model_directory) | spread

    vllm_engine._device_options = of_many


if __name__ == "__main__":
    main()
