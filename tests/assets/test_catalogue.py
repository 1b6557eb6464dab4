"""The default catalogue holds together: what is pinned, what the command line carries, what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stillhouse.assets.datasets import READERS
from stillhouse.assets.materialise import DatasetStep, ModelStep
from stillhouse.config.assets import HubSource, ModelEntry, Package, PackageSource, PathSource
from stillhouse.config.catalogue import DATASETS, MODELS
from stillhouse.runtime.commands import dotted_arguments, parse_settings


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_command_line_of_a_model_carries_its_entry(name: str) -> None:
    settings = {"kind": "model", "name": name, "output": "out", "entry": MODELS[name].materialise_settings()}
    step = parse_settings(ModelStep, dotted_arguments(settings))
    assert step.entry.materialise_settings() == MODELS[name].materialise_settings()


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_the_command_line_of_a_data_set_carries_its_entry(name: str) -> None:
    settings = {"kind": "dataset", "name": name, "output": "out", "entry": DATASETS[name].materialise_settings()}
    step = parse_settings(DatasetStep, dotted_arguments(settings))
    assert step.entry.materialise_settings() == DATASETS[name].materialise_settings()
    assert step.entry.reader in READERS


def test_every_packaged_asset_is_pinned_by_a_hash() -> None:
    for entry in (*MODELS.values(), *DATASETS.values()):
        for source in entry.sources:
            if isinstance(source, PackageSource):
                assert entry.sha256 or all(package.sha256 for package in source.packages)


def test_what_describes_an_entry_makes_nothing_stale() -> None:
    entry = MODELS["smollm2_135m"]
    described = entry.model_copy(update={"note": "other", "vllm": False})
    assert described.materialise_settings() == entry.materialise_settings()


def test_an_sdist_without_a_hash_is_refused() -> None:
    with pytest.raises(ValidationError, match="sha256 of the sdist thing is required"):
        Package(name="thing", version="1", sdist=True)


def test_a_package_source_must_name_its_files_or_a_folder() -> None:
    with pytest.raises(ValidationError, match="each package needs its 'file'"):
        PackageSource(packages=(Package(name="thing", version="1"),))


def test_a_gguf_entry_must_name_one_file() -> None:
    with pytest.raises(ValidationError, match="a hub source of format gguf must name one file"):
        ModelEntry(format="gguf", sources=(HubSource(repo="people/model"),))


def test_fixes_belong_to_gguf() -> None:
    with pytest.raises(ValidationError, match="'fixes' mend GGUF files only"):
        ModelEntry(sources=(PathSource(path="model"),), fixes=("tie_embeddings",))
