"""Opens vLLM engines in a process of their own, as an evaluation step does, and writes their answers as JSON.

Two engines one after the other: a model with its adapters, then a fully fine-tuned checkpoint.
Usage: python -m tests.evaluation.vllm_program REQUEST.json ANSWERS.json
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine
from stillhouse.runtime.files import read_json, write_json
from stillhouse.runtime.logs import configure_logging


def main() -> None:
    """Answer the request's prompts with each engine and adapter."""
    configure_logging()
    request = read_json(Path(sys.argv[1]))
    settings = EngineSettings(kind="auto", precision="fp32", max_model_length=128, kv_cache_gib=0.05)
    greedy = GenerationSettings(max_new_tokens=request["max_new_tokens"])
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
    write_json(Path(sys.argv[2]), {"engine": type(engine).__name__, "answers": answers})


if __name__ == "__main__":
    main()
