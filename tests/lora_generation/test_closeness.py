"""How near adapters are: to the naive definitions, for adapters that the cache knows and for those that it lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora_tensors import mean_adapter, read_adapter, write_adapter
from stillhouse.studies.lora_generation.closeness import Ruler, map_of, weight_gram
from stillhouse.studies.lora_generation.clusters import silhouettes
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.deltas import Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.manifest import read_collection
from tests.lora_generation.conftest import TinyStudy

TEACHER = "apples/shard_3-seed_42/step_10"
OTHERS = ("apples/shard_0-seed_42/step_10", "rivers/shard_1-seed_42/step_10")


def delta_of(study: TinyStudy, folder: Path) -> np.ndarray:
    """The delta activation of one adapter, computed with nothing kept."""
    model = frozen(load_model(study.model, "fp32", "cpu"))
    probes = Probes.tokenise(DeltaCache.load(study.deltas).probes, load_tokenizer(study.model), model)
    return delta_activation(model, read_adapter(folder), probes, base_activation(model, probes)).double().numpy()


def test_closeness_is_cosine_norm_ratio_and_relative_error_of_the_products(
    tiny_study: TinyStudy, tmp_path: Path
) -> None:
    folders = [tiny_study.adapters / name for name in OTHERS]
    write_adapter(mean_adapter([read_adapter(folder) for folder in folders]), tmp_path / "made", "tiny")
    teacher = tiny_study.adapters / TEACHER
    ruler = Ruler(tiny_study.model, DeltaCache.load(tiny_study.deltas))
    known = dict(ruler.deltas)
    ruler.prepare([*folders, tmp_path / "made"])
    assert len(ruler.deltas) == len(known) + 1
    for folder in (*folders, tmp_path / "made"):
        found = ruler.closeness(folder, teacher)
        own, other = delta_of(tiny_study, folder), delta_of(tiny_study, teacher)
        norms = np.linalg.norm(own), np.linalg.norm(other)
        assert found.cosine == pytest.approx(own @ other / (norms[0] * norms[1]), abs=1e-4)
        assert found.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-4)
        adapter, reference = read_adapter(folder), read_adapter(teacher)
        products = [(adapter.delta_w(m.name), reference.delta_w(m.name)) for m in adapter.layout.modules]
        distance = sum(float((first - second).square().sum()) for first, second in products)
        size = sum(float(second.square().sum()) for _, second in products)
        assert found.relative_error == pytest.approx((distance / size) ** 0.5, rel=1e-4)


def test_inner_products_of_weights_are_those_of_all_entries_of_a_and_b(tiny_study: TinyStudy) -> None:
    adapters = [read_adapter(tiny_study.adapters / name) for name in (TEACHER, *OTHERS)]
    flat = torch.stack(
        [torch.cat([matrix.flatten() for matrix in (*one.a.values(), *one.b.values())]) for one in adapters]
    ).double()
    assert flat.shape[1] == adapters[0].layout.values
    assert weight_gram(adapters) == pytest.approx((flat @ flat.T).numpy(), rel=1e-6)


def test_the_map_has_a_place_for_every_adapter_and_silhouettes_of_both_kinds(tiny_study: TinyStudy) -> None:
    cache, rows = DeltaCache.load(tiny_study.deltas), read_collection(tiny_study.adapters)
    clusters, points = map_of(rows, tiny_study.adapters, cache)
    assert [(point.name, point.task) for point in points] == [(row.name, row.task) for row in rows]
    tasks = [row.task for row in rows]
    deltas = cache.of([row.digest for row in rows]).double().numpy()
    weights = weight_gram([read_adapter(tiny_study.adapters / row.name) for row in rows])
    assert clusters.by_delta.value == pytest.approx(silhouettes(deltas @ deltas.T, tasks).mean(), rel=1e-5)
    assert clusters.by_weights.value == pytest.approx(silhouettes(weights, tasks).mean(), rel=1e-5)
