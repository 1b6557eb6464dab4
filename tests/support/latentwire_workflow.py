"""LatentWire on two tiny models, in a folder that holds the workflow already: `wire.yaml` beside the other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from support.tiny_models import make_tiny_llama
from support.workflow import Workflow, merged

CONFIG = "wire.yaml"
# What `all` would make of this study; results.md belongs to whoever runs all studies.
FIGURES = ("f1_vs_bytes", "arms", "first_token", "diagnostics", "training", "sweep")
TARGETS = ("results/latentwire/section.md", *(f"results/figures/latentwire/{figure}.png" for figure in FIGURES))
TINY_WIRE: dict[str, Any] = {
    "pairs": ["tiny_pair"],
    "pair_settings": {"tiny_pair": {"models": ["tiny", "tiny_other"]}},
    "conditions": ["latent", "prefix_kd"],
    "task": {
        "dataset": "tiny_reading",
        "train": {"source": "all", "size": 8},
        "validation": {"source": "all", "size": 4},
        "test": {"source": "all", "size": 6},
        "max_text_bytes": 130,
    },
    "defaults": {
        "latent": {"length": 3, "dimension": 8},
        "encoder": {"layers": 1, "width": 16, "heads": 2},
        "diagnostics_every": 1,
        "training": {
            "steps": 2,
            "batch_size": 4,
            "save_every": 1,
            "resume_every": 1,
            "schedule": {"warmup_steps": 1},
            "precision": "fp32",
        },
        "reader": {"precision": "fp32"},
    },
    "sweeps": {"length": {"condition": "latent", "axes": {"latent.length": [2]}}},
    "evaluation": {"generation": {"max_new_tokens": 3}, "wire": {"formats": ["fp16", "int4"], "headline": "int4"}},
}


def add_latentwire(workflow: Workflow) -> None:
    """Put a second model, questions about passages, and `wire.yaml` into the folder."""
    assets = workflow.directory / "assets"
    make_tiny_llama(assets / "tiny_other", vocab_size=320, seed=1, chat_template=False)
    (assets / "reading").mkdir()
    with (assets / "reading" / "all.jsonl").open("w") as stream:
        for number in range(24):
            record = {
                "id": f"q{number}",
                "title": f"article {number // 2}",
                "context": f"Ann has {number} apples. {'The market was busy. ' * (number % 7)}",
                "question": "How many apples has Ann?",
                "answers": {"text": [f"{number}", f"{number} apples"]},
            }
            stream.write(json.dumps(record) + "\n")
    write_wire_config(workflow.directory / CONFIG, {})


def write_wire_config(path: Path, study: dict[str, Any]) -> None:
    """Write the tiny configuration with overrides of the study's settings."""
    configuration = {
        "studies": ["latentwire"],
        "models": {
            name: {
                "format": "transformers",
                "licence": "none",
                "sources": [{"kind": "path", "path": f"assets/{name}"}],
            }
            for name in ("tiny", "tiny_other")
        },
        "datasets": {
            "tiny_reading": {
                "task": "reading_comprehension",
                "reader": "squad",
                "splits": {"all": "all.jsonl"},
                "licence": "none",
                "sources": [{"kind": "path", "path": "assets/reading"}],
            }
        },
        "latentwire": merged(TINY_WIRE, study),
    }
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))
