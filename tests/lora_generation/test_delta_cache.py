"""The cache of delta activations: what it holds, what it is keyed by, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora import ADAPTER_WEIGHTS
from stillhouse.models.lora_tensors import read_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.lora_generation.delta_cache import DeltaCache, DeltasStep, main
from stillhouse.studies.lora_generation.deltas import Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.manifest import read_collection
from stillhouse.studies.lora_generation.probes import GENERIC, ProbeSettings
from tests.lora_generation.conftest import TinyStudy
from tests.lora_generation.tiny_collection import make_collection
from tests.support.tiny_models import make_tiny_llama


def test_every_adapter_of_the_collection_has_its_own_delta(tiny_study: TinyStudy) -> None:
    cache, rows = DeltaCache.load(tiny_study.deltas), read_collection(tiny_study.adapters)
    assert len(rows) == 12
    model = frozen(load_model(tiny_study.model, "fp32", "cpu"))
    probes = Probes.tokenise(cache.probes, load_tokenizer(tiny_study.model), model)
    torch.testing.assert_close(cache.base, base_activation(model, probes))
    for row in (rows[0], rows[-1]):
        own = delta_activation(model, read_adapter(tiny_study.adapters / row.name), probes, cache.base)
        torch.testing.assert_close(cache.of([row.digest])[0], own, atol=1e-5, rtol=1e-5)
    assert len({tuple(delta.tolist()) for delta in cache.deltas.values()}) == 12


def test_the_directory_has_a_manifest_the_base_and_a_file_per_adapter(tiny_study: TinyStudy) -> None:
    manifest = read_json(tiny_study.deltas / "manifest.json")
    assert manifest["probe_texts"] == list(GENERIC)
    assert manifest["probes"]["kind"] == "generic"
    assert numpy.load(tiny_study.deltas / "base_activation.npy").shape == (32,)
    assert all((tiny_study.deltas / file).is_file() for file in manifest["adapters"].values())
    assert len(list((tiny_study.deltas / "deltas").iterdir())) == 12


def test_new_adapters_cost_no_more_than_themselves_and_other_probes_everything(
    tiny_study: TinyStudy, tmp_path: Path
) -> None:
    def computed(name: str, adapters: Path, probes: ProbeSettings) -> int:
        output = tmp_path / name
        step = DeltasStep(
            model=tiny_study.model, adapters=adapters, output=output, work=tmp_path / "work", probes=probes
        )
        main(step)
        return int(json.loads((output / "run.json").read_text())["computed"])

    generic = ProbeSettings(kind="generic")
    two = make_collection(tmp_path / "two", tiny_study.model, shards=2)
    three = make_collection(tmp_path / "three", tiny_study.model, shards=3)
    assert computed("first", two, generic) == 6
    assert computed("again", two, generic) == 0
    assert computed("more", three, generic) == 3
    assert computed("longer", two, ProbeSettings(kind="generic", max_length=64)) == 6
    first, again = DeltaCache.load(tmp_path / "first"), DeltaCache.load(tmp_path / "again")
    assert all(torch.equal(delta, again.deltas[key]) for key, delta in first.deltas.items())


def step_of(study: TinyStudy, adapters: Path, folder: Path) -> DeltasStep:
    probes = ProbeSettings(kind="generic")
    return DeltasStep(model=study.model, adapters=adapters, output=folder / "o", work=folder / "w", probes=probes)


def test_an_adapter_that_was_exchanged_is_named(tiny_study: TinyStudy, tmp_path: Path) -> None:
    adapters = make_collection(tmp_path / "adapters", tiny_study.model, tasks=("apples",), shards=2)
    rows = [row.model_dump(mode="json") for row in read_collection(adapters)]
    shutil.copy(adapters / rows[0]["name"] / ADAPTER_WEIGHTS, adapters / rows[1]["name"])
    with pytest.raises(UserError, match=rf"{rows[1]['name']}/{ADAPTER_WEIGHTS}: is corrupt"):
        main(step_of(tiny_study, adapters, tmp_path))
    write_manifest(adapters, {"adapters": rows})
    with pytest.raises(UserError, match=rf"{rows[1]['name']}: is not the adapter that the collection's manifest lists"):
        main(step_of(tiny_study, adapters, tmp_path))


def test_another_base_a_missing_delta_and_a_damaged_cache_are_named(tiny_study: TinyStudy, tmp_path: Path) -> None:
    cache = DeltaCache.load(tiny_study.deltas)
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"deltas: its delta activations are not those of .*other"):
        cache.behaviour(other)
    with pytest.raises(UserError, match=r"deltas: has no delta activation of the adapter with digest 0123"):
        cache.of(["0123"])
    copied = tmp_path / "deltas"
    shutil.copytree(tiny_study.deltas, copied)
    (copied / "base_activation.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"base_activation.npy: has 0 bytes"):
        DeltaCache.load(copied)
    write_manifest(copied)
    with pytest.raises(UserError, match=r"manifest.json: describes no delta activations"):
        DeltaCache.load(copied)
