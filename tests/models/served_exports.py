"""Lets vLLM answer prompts with each exported model, in a process of its own, and writes the token ids as JSON.

Usage: python -m tests.models.served_exports REQUEST.json ANSWERS.json
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine
from stillhouse.runtime.files import read_json, write_json


def main() -> None:
    """Open one engine after the other, each for one model."""
    request = read_json(Path(sys.argv[1]))
    settings = EngineSettings(kind="vllm", precision="bf16", max_model_length=128, kv_cache_gib=0.05)
    greedy = GenerationSettings(max_new_tokens=request["max_new_tokens"])
    answers = {}
    for directory in request["models"]:
        with closing(open_engine(Path(directory), settings)) as engine:
            answers[directory] = [answer.token_ids for answer in engine.generate(request["prompts"], greedy)]
    write_json(Path(sys.argv[2]), answers)


if __name__ == "__main__":
    main()
