"""How near adapters come to a teacher, by behaviour and by weights, and whether adapters lie together by task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stillhouse.evaluation.results_files import Interval
from stillhouse.evaluation.statistics import bootstrap_mean_interval
from stillhouse.models.lora_tensors import AdapterTensors, adapter_digest, read_adapter, relative_error, stacked
from stillhouse.studies.lora_generation.clusters import Floats, principal_coordinates, silhouettes
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.results import Closeness, Clusters, Point


class Ruler:
    """Measures adapters against teachers with the probes of the teachers' cache; computes what the cache lacks."""

    def __init__(self, model: Path, cache: DeltaCache, trust_remote_code: bool = False) -> None:
        self.behaviour = cache.behaviour(model, trust_remote_code)
        self.deltas = dict(cache.deltas)

    @torch.no_grad()
    def prepare(self, folders: Sequence[Path]) -> None:
        """Compute the delta activations of adapters that are not known yet, several in one pass."""
        named = {adapter_digest(adapter): adapter for adapter in map(read_adapter, folders)}
        missing = [key for key in named if key not in self.deltas]
        size = self.behaviour.probes.settings.at_once
        for group in (missing[start : start + size] for start in range(0, len(missing), size)):
            batch = stacked([named[key] for key in group]).to(self.behaviour.model.device)
            computed = self.behaviour.delta(batch).cpu()
            self.deltas |= dict(zip(group, computed, strict=True))

    def closeness(self, folder: Path, teacher: Path) -> Closeness:
        """Cosine and norm ratio of the delta activations, and the relative error of the weights."""
        adapter, reference = read_adapter(folder), read_adapter(teacher)
        own, other = self.deltas[adapter_digest(adapter)], self.deltas[adapter_digest(reference)]
        return Closeness(
            cosine=float(cosine_similarity(own, other, dim=0)),
            norm_ratio=float(own.norm() / other.norm()),
            relative_error=float(relative_error(adapter, reference)),
        )


def map_of(rows: Sequence[AdapterRow], collection: Path, cache: DeltaCache) -> tuple[Clusters, list[Point]]:
    """Silhouettes by task and two principal components, of delta activations and of flattened A and B."""
    deltas = cache.of([row.digest for row in rows]).double()
    grams = {
        "by_delta": (deltas @ deltas.T).numpy(),
        "by_weights": weight_gram([read_adapter(collection / row.name) for row in rows]),
    }
    tasks = [row.task for row in rows]
    scores = {name: silhouettes(gram, tasks) for name, gram in grams.items()}
    places = {name: principal_coordinates(gram) for name, gram in grams.items()}
    points = [
        Point(
            name=row.name,
            task=row.task,
            by_delta=(float(by_delta[0]), float(by_delta[1])),
            by_weights=(float(by_weights[0]), float(by_weights[1])),
        )
        for row, by_delta, by_weights in zip(rows, places["by_delta"], places["by_weights"], strict=True)
    ]
    return Clusters(**{name: Interval.of(bootstrap_mean_interval(own)) for name, own in scores.items()}), points


def weight_gram(adapters: Sequence[AdapterTensors]) -> Floats:
    """Inner products [n, n] of all entries of A and B, module by module."""
    total = np.zeros((len(adapters), len(adapters)))
    for module in adapters[0].layout.modules:
        for matrices in ([one.a[module.name] for one in adapters], [one.b[module.name] for one in adapters]):
            flat: Tensor = torch.stack([matrix.flatten() for matrix in matrices]).double()
            total += (flat @ flat.T).numpy()
    return total
