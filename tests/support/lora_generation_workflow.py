"""LoRA generation on a tiny model, in a folder that holds the workflow already: `lora.yaml` beside the other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.tiny_models import make_tiny_sentence_encoder
from support.workflow import Workflow, merged

CONFIG = "lora.yaml"
FIGURES = ("accuracy", "delta_map", "ablation", "cosine", "training")


def _task(dataset: str, style: str) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "style": style,
        "train": {"source": "all", "size": 12},
        "validation": {"source": "all", "size": 4},
        "test": {"source": "all", "size": 5},
    }


# One task of choices to learn from, and one of worked answers that generators never see.
TINY_LORA: dict[str, Any] = {
    "models": ["tiny"],
    "tasks": ["choices", "arithmetic"],
    "task_settings": {
        "choices": _task("tiny_choices", "question"),
        "arithmetic": _task("tiny_arithmetic", "worked"),
    },
    "conditions": ["multi_task", "weight_only"],
    "seeds": [42],
    "teachers": {
        "shards": 4,
        "shard_examples": 3,
        "validation_shards": 1,
        "held_out_shards": 1,
        "at_once": 4,
        "prompts": 2,
        "better_by": "gold_nll",
        "flagged": "use",
        "training": {
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 0.01,
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"warmup_steps": 1},
            "save_every": 2,
            "precision": "fp32",
        },
    },
    "probes": {"kind": "generic"},
    "text": {"encoder": "tiny_encoder"},
    "precision": "fp32",
    "defaults": {
        "held_out_tasks": ["arithmetic"],
        "generator": {"prompts": 2, "width": 8, "layers": 1},
        "training": {
            "steps": 2,
            "batch_size": 2,
            "schedule": {"warmup_steps": 1},
            "save_every": 1,
            "precision": "fp32",
        },
    },
    "evaluation": {
        "in_context_examples": 1,
        "few_prompt_steps": 2,
        "engine": {"kind": "transformers", "max_model_length": 2048},
        "generation": {"max_new_tokens": 4},
    },
}


def add_lora_generation(workflow: Workflow) -> None:
    """Put a sentence encoder, multiple-choice questions and `lora.yaml` into the folder."""
    assets = workflow.directory / "assets"
    make_tiny_sentence_encoder(assets / "tiny_encoder")
    (assets / "choices").mkdir()
    with (assets / "choices" / "all.jsonl").open("w") as stream:
        for number in range(24):
            record = {
                "id": f"c{number}",
                "question": f"Ann has {number} apples. What has she?",
                "choices": {"text": [f"{number} apples", "many books", "coins"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[number % 3],
            }
            stream.write(json.dumps(record) + "\n")
    write_lora_config(workflow.directory / CONFIG, {})


def write_lora_config(path: Path, study: dict[str, Any]) -> None:
    """Write the tiny configuration with overrides of the study's settings."""
    configuration = {
        "studies": ["lora_generation"],
        "models": {
            "tiny": _model("tiny"),
            "tiny_encoder": _model("tiny_encoder"),
        },
        "datasets": {
            "tiny_choices": {"task": "answer_choices", "reader": "arc", **_data("choices")},
            "tiny_arithmetic": {"reader": "gsm8k", **_data("arithmetic")},
        },
        # Two jobs side by side: their models are tiny.
        "resources": {name: {"threads": 1} for name in ("training", "evaluation")},
        "lora_generation": merged(TINY_LORA, study),
    }
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))


def _model(name: str) -> dict[str, Any]:
    return {"format": "transformers", "licence": "none", "sources": [{"kind": "path", "path": f"assets/{name}"}]}


def _data(folder: str) -> dict[str, Any]:
    source = {"kind": "path", "path": f"assets/{folder}"}
    return {"splits": {"all": "all.jsonl"}, "licence": "none", "sources": [source]}
