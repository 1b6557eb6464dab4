"""Zero-shot multiple choice through lm-evaluation-harness: its prompts, its scoring, its versions; our own data.

`tasks/` has a file a task, the harness' own definition over the records of `assets.records.ChoiceQuestion`, so that a
machine without the hub scores what the published numbers are about. Tests compare each with the stock definition.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.records import ChoiceQuestion

TASKS = Path(__file__).parent / "tasks"
DATA_FILES = [
    "tasks/arc_challenge.yaml",
    "tasks/arc_easy.yaml",
    "tasks/hellaswag.yaml",
    "tasks/mmlu.yaml",
    "tasks/winogrande.yaml",
]


@dataclass(frozen=True)
class ChoiceScore:
    """One question's outcome. acc_norm divides each choice's log-likelihood by its length in characters.

    acc_norm is None where the task does not define it. log_likelihoods: one per choice, nats.
    """

    item_id: str
    acc: bool
    acc_norm: bool | None
    log_likelihoods: tuple[float, ...]


def drawn_items(questions: Items[ChoiceQuestion], items: int | None, seed: int) -> list[ChoiceQuestion]:
    """`items` of the questions by seed, in their own order; None, or as many as there are: all.

    A set's first items may be all of one kind (HellaSwag's are), so a part of it is drawn.
    """
    if items is None or items >= len(questions):
        return list(questions)
    places = sorted(random.Random(seed).sample(range(len(questions)), items))
    return [questions[place] for place in places]


def task_definition(name: str) -> dict[str, Any]:
    """The content of a task file."""
    definition: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    return definition


def task_versions(names: Items[str]) -> dict[str, str]:
    """The version of each task's definition, for the record."""
    return {name: str(task_definition(name)["metadata"]["version"]) for name in names}


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Items[ChoiceQuestion]],
    batch_size: int,
) -> dict[str, list[ChoiceScore]]:
    """Each task's outcomes in the order of its questions; `model` is in memory and stays as it is."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is in memory already
    with TemporaryDirectory() as folder:
        # Without the defaults, whose index takes seconds to build and names the hub's data.
        loaded = TaskManager(include_defaults=False).load(
            [_with_data(name, items, Path(folder)) for name, items in questions.items()]
        )
        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = evaluate(harness_model, task_dict=loaded, bootstrap_iters=0)
    return {name: [_score(sample) for sample in results["samples"][name]] for name in questions}


def _with_data(name: str, questions: Items[ChoiceQuestion], folder: Path) -> dict[str, Any]:
    """A task's definition over these questions, written to `folder`, where `datasets` keeps its own files too."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(asdict(question)) + "\n" for question in questions), encoding="utf-8")
    location = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    return {**task_definition(name), "dataset_path": "json", "dataset_kwargs": location}


def _score(sample: Mapping[str, Any]) -> ChoiceScore:
    norm = sample.get("acc_norm")
    return ChoiceScore(
        item_id=sample["doc"]["id"],
        acc=bool(sample["acc"]),
        acc_norm=None if norm is None else bool(norm),
        log_likelihoods=tuple(float(response[0]) for response in sample["filtered_resps"]),
    )
