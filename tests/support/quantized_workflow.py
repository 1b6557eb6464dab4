"""Quantised distillation on a tiny model, in a folder of its own with the workflow in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.workflow import Workflow, make_workflow, merged

CONFIG = "tiny.yaml"
STUDY = "quantized_distillation"
FIGURES = ("perplexity_curve", "accuracy", "sweep_lr", "beta_lambda", "recovered", "sweep")
TINY_STUDY: dict[str, Any] = {
    "models": ["tiny"],
    "conditions": ["teacher", "ptq", "off_policy", "on_policy"],
    "seeds": [1],
    "task": {
        "dataset": "tiny_instructions",
        "train": {"source": "all", "size": 12},
        "validation": {"source": "all", "size": 4},
        "test": {"source": "all", "size": 6},
    },
    "defaults": {
        "max_length": 64,
        "response_room": 4,
        "format": {"kind": "int4", "group_size": 16},
        "sampling": {"min_new_tokens": 1, "max_new_tokens": 4},
        "validation": {"text": "tiny_passages", "text_split": "all", "text_tokens": 96, "window": 32, "stride": 16},
        "training": {
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "save_every": 1,
            "resume_every": 1,
            # From the first update on, so that every checkpoint differs from plain rounding.
            "schedule": {"warmup_steps": 0},
            "lora": {"rank": 2, "alpha": 32},
        },
    },
    "sweeps": {
        "policies": {
            "condition": "off_policy",
            "axes": {"training.learning_rate": [1e-2], "distillation.beta": [0.0, 1.0]},
        }
    },
    "evaluation": {
        "tasks": {
            "arc_easy": {"dataset": "tiny_choices", "split": "all", "items": 6},
            "winogrande": {"dataset": "tiny_names", "split": "all", "items": 4},
        },
        # The name of the default text, which a layer can change but not take away.
        "texts": {"wikipedia": {"dataset": "tiny_passages", "split": "all", "tokens": 300}},
        "window": 32,
        "stride": 16,
        "precision": "fp32",
        "batch_size": 4,
    },
}


def make_quantized_workflow(directory: Path, model: Path) -> Workflow:
    """The workflow's parts, the tiny model, and data of every kind that the study reads."""
    workflow = make_workflow(directory, model)
    sentences = [f"Ann has {n} apples and gives Ben {n + 1} of her own coins." for n in range(24)]
    rows: dict[str, list[dict[str, Any]]] = {
        "instructions": [{"instruction": f"Say {n}.", "input": "", "output": text} for n, text in enumerate(sentences)],
        "choices": [
            {"question": f"Which is {n}?", "choices": {"label": ["A", "B"], "text": [f"{n}", "more"]}, "answerKey": "A"}
            for n in range(12)
        ],
        "names": [
            {"sentence": f"Ann saw Ben {n} times as _ left.", "option1": "Ann", "option2": "Ben", "answer": "2"}
            for n in range(8)
        ],
    }
    for name, records in rows.items():
        (directory / "assets" / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / "assets" / name / "all.jsonl").write_text(lines)
    write_quantized_config(directory / CONFIG, {})
    return workflow


def write_quantized_config(path: Path, study: dict[str, Any]) -> None:
    """Write the tiny configuration with overrides of the study's settings."""
    datasets = {
        "tiny_instructions": ("instruction", "alpaca", "instructions"),
        "tiny_passages": ("passages", "text", "passages"),
        "tiny_choices": ("answer_choices", "arc", "choices"),
        "tiny_names": ("answer_choices", "winogrande", "names"),
    }
    configuration = {
        "studies": [STUDY],
        "models": {
            "tiny": {"format": "transformers", "licence": "none", "sources": [{"kind": "path", "path": "assets/tiny"}]}
        },
        "datasets": {
            name: {
                "task": task,
                "reader": reader,
                "splits": {"all": "all.jsonl"},
                "licence": "none",
                "sources": [{"kind": "path", "path": f"assets/{folder}"}],
            }
            for name, (task, reader, folder) in datasets.items()
        },
        STUDY: merged(TINY_STUDY, study),
    }
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))
