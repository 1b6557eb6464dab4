"""A copy of the workflow in a folder of its own, with a tiny model and data set: for tests that run or plan it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.warm_python import warm_environment

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "rules", "src", "workflow_scripts", "config", "envs", "profiles", "docs/captions")

TINY_STUDY: dict[str, Any] = {
    "models": ["tiny"],
    "conditions": ["base_zero_shot", "base_few_shot", "baseline", "online_v1", "kl_t1", "kl_full", "lora_teacher"],
    "condition_settings": {"kl_full": {"distillation": {"loss": "kl"}, "training": {"method": "full"}}},
    "task": {
        "dataset": "tiny_arithmetic",
        "train": {"source": "all", "size": 12},
        "validation": {"source": "all", "size": 6},
        "test": {"source": "all", "size": 6},
    },
    "defaults": {
        "teacher": {"context": {"shots": 2, "sampling": "per_example"}, "cache_top_k": 8},
        "distillation": {"top_k": 8},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "save_every": 2,
            "resume_every": 1,
            "schedule": {"warmup_steps": 1},
            "lora": {"rank": 2},
            "precision": "fp32",
        },
    },
    "task_teacher": {"steps": 2, "batch_size": 4, "save_every": 2, "schedule": {"warmup_steps": 1}},
    "evaluation": {
        "engine": {"kind": "transformers", "max_model_length": 2048},
        "generation": {"max_new_tokens": 8},
        "few_shot_counts": [2],
        "generated_items": 4,
        "transfer": {"tiny_sums": {"source": "all", "size": 3}},
    },
}

# One lens on cached activations, and one of another layer that computes its own.
TINY_LENS: dict[str, Any] = {
    "models": ["tiny"],
    "conditions": ["lens", "on_the_fly"],
    "condition_settings": {"on_the_fly": {"activations": "on_the_fly", "lens": {"layer": 2}}},
    "task": {
        "dataset": "tiny_passages",
        "train": {"source": "all", "size": 16},
        "validation": {"source": "all", "size": 6},
        "test": {"source": "all", "size": 8},
    },
    "tokens": {"max_length": 32, "shard_documents": 6},
    "defaults": {
        "positions": {"minimum": 3},
        "max_length": 32,
        "lens": {"layer": 1, "text_length": 3, "encoder": {"output_layer": 1}},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_tokens": 512,
            "precision": "fp32",
            "save_every": 2,
            "resume_every": 2,
        },
    },
    "evaluation": {
        "batch_size": 4,
        "best_of": [1, 2],
        "verbose_samples": 2,
        "top_n": 2,
        "continuation_tokens": 2,
    },
}


@dataclass(frozen=True)
class Workflow:
    """One folder with the workflow in it."""

    directory: Path

    def run(
        self, *arguments: str, config: str = "tiny.yaml", check: bool = True, cores: int | None = 2
    ) -> subprocess.CompletedProcess[str]:
        """Run snakemake here, on the folder's own sources; without `cores` it is told of none."""
        command, environment = self._command(arguments, config, cores)
        environment |= warm_environment()
        done = subprocess.run(
            ["python", *command[1:]], cwd=self.directory, env=environment, capture_output=True, text=True
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done

    def start(self, *arguments: str, config: str = "tiny.yaml", cores: int | None = 2) -> subprocess.Popen[bytes]:
        """Start snakemake here and return at once; it leads a session of its own, so that it can be killed whole."""
        command, environment = self._command(arguments, config, cores)
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            command, cwd=self.directory, env=environment, stdout=quiet, stderr=quiet, start_new_session=True
        )

    def _command(self, arguments: tuple[str, ...], config: str, cores: int | None) -> tuple[list[str], dict[str, str]]:
        environment = {**os.environ, "PYTHONPATH": str(self.directory / "src"), "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        told = ["--cores", str(cores)] if cores else []
        return [sys.executable, "-m", "snakemake", "--configfile", config, *told, *arguments], environment

    def planned(self, *arguments: str, config: str = "tiny.yaml") -> dict[str, int]:
        """The jobs that a dry run would start, counted by rule, targets left out."""
        done = self.run("-n", *arguments, config=config)
        text = done.stdout + done.stderr
        table = re.search(r"Job stats:\n(.*?)\n\n", text, re.DOTALL)
        if table is None:
            assert "Nothing to be done" in text, text[-3000:]
            return {}
        rows = [line.split() for line in table[1].splitlines()[2:]]
        return {rule: int(count) for rule, count in rows if rule not in {"all", "total"}}

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace text in one of the folder's files; the text must be there."""
        file = self.directory / path
        text = file.read_text()
        assert old in text, f"{path} has no {old!r}"
        file.write_text(text.replace(old, new, 1))


def make_workflow(
    directory: Path,
    model: Path,
    study: dict[str, Any] | None = None,
    studies: tuple[str, ...] = ("context_distillation",),
) -> Workflow:
    """Copy the workflow's parts and write `tiny.yaml`, a configuration on a tiny model and made-up data."""
    directory.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        source, target = REPOSITORY / part, directory / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)
    data = directory / "assets" / "arithmetic"
    data.mkdir(parents=True)
    with (data / "all.jsonl").open("w") as stream:
        for number in range(30):
            record = {
                "id": f"sum-{number}",
                "question": f"Ann has {number} apples and buys {number + 1} more. How many has she?",
                "answer": f"{number} + {number + 1} = {2 * number + 1}\n#### {2 * number + 1}",
            }
            stream.write(json.dumps(record) + "\n")
    sums = [{"question": f"What is {n} and {n}?", "final_ans": str(2 * n)} for n in range(5)]
    (directory / "assets" / "sums").mkdir()
    (directory / "assets" / "sums" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    chance = random.Random(0)
    words = ["Ann", "Ben", "has", "buys", "many", "apples", "coins", "and", "more", "sums", "to", "count"]
    passages = [{"id": str(n), "text": " ".join(chance.choices(words, k=12 + n % 9))} for n in range(30)]
    (directory / "assets" / "passages").mkdir()
    (directory / "assets" / "passages" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    shutil.copytree(model, directory / "assets" / "tiny")
    write_config(directory / "tiny.yaml", study or {}, studies)
    return Workflow(directory)


def rule_texts() -> dict[str, str]:
    """The text of every rule that makes a file, by its name."""
    text = "".join(path.read_text() for path in sorted((REPOSITORY / "rules").glob("*.smk")))
    parts = re.split(r"^rule (\w+):$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def write_config(path: Path, study: dict[str, Any], studies: tuple[str, ...] = ("context_distillation",)) -> None:
    """Write the tiny configuration of `studies`, with overrides of the first one's settings."""
    sections = {"context_distillation": TINY_STUDY, "consistency_lens": TINY_LENS}
    sections[studies[0]] = merged(sections[studies[0]], study)
    configuration = {
        "studies": list(studies),
        "models": {
            "tiny": {
                "format": "transformers",
                "licence": "none",
                "sources": [{"kind": "path", "path": "assets/tiny"}],
            }
        },
        "datasets": {
            "tiny_arithmetic": {
                "reader": "gsm8k",
                "splits": {"all": "all.jsonl"},
                "licence": "none",
                "sources": [{"kind": "path", "path": "assets/arithmetic"}],
            },
            "tiny_sums": {
                "reader": "multi_arith",
                "splits": {"all": "all.jsonl"},
                "licence": "none",
                "sources": [{"kind": "path", "path": "assets/sums"}],
            },
            "tiny_passages": {
                "task": "passages",
                "reader": "text",
                "splits": {"all": "all.jsonl"},
                "licence": "none",
                "sources": [{"kind": "path", "path": "assets/passages"}],
            },
        },
        **sections,
    }
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))


def merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`base` with `other` laid over it, mappings merged."""
    result = dict(base)
    for key, value in other.items():
        mapping = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if mapping else value
    return result
