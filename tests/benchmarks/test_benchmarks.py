"""Every benchmark's forms agree on a tiny scale: what `make benchmark` checks first, where a change can break it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.catalogue import BENCHMARKS, MEASURED
from benchmarks.harness import compare
from benchmarks.ms_swift import BUILD, ENVIRONMENT, REPOSITORY
from benchmarks.scale import TINY
from benchmarks.scaling import SERIES

# One worker: a server that has imported everything forks the processes that measure memory.
pytestmark = pytest.mark.xdist_group("benchmarks")
# Starts engines, or processes of its own, or a compiler.
SLOW = {"evaluation", "packing", "compiled_lens", "ms_swift"}
# What chance decides; what is only another form's reference; and the model's own rate.
UNCOMPARED = {
    "gkd_off_policy": {"merged by autograd on the same answers"},
    "gkd_on_policy": {
        "TRL GKDTrainer",
        "TRL GKDTrainer without checkpointing",
        "TRL DistillationTrainer",
        "TRL DistillationTrainer on the answers that ours sampled",
        "TRL GKDTrainer on the answers that ours sampled",
        "merged by autograd on the same answers",
    },
    "fake_quantisation": {"merged by autograd"},
    "activation_extraction": {"forward alone"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MEASURED],
)
def test_all_forms_of_a_benchmark_compute_the_same(name: str, folder: Path) -> None:
    if name == "ms_swift" and not (REPOSITORY / ENVIRONMENT).exists():
        pytest.skip(f"{ENVIRONMENT} is missing; to build it: {BUILD}")
    benchmark = MEASURED[name]
    scale = benchmark.checked(benchmark.change(TINY))
    works = {form.name: form.prepare(folder, scale) for form in benchmark.forms}
    errors = compare(benchmark, works)
    first, *others = (form.name for form in benchmark.forms)
    assert errors.keys() - {first} == set(others) - UNCOMPARED.get(name, set())
    [ours] = (form.name for form in benchmark.forms if form.role == "ours")
    assert ours in errors
    floor = benchmark.floor(folder, scale)
    assert floor.operations > 0 and floor.bytes > 0 and floor.tokens > 0


def test_aims_and_series_name_forms_that_there_are() -> None:
    for benchmark in MEASURED.values():
        names = [form.name for form in benchmark.forms]
        assert len(names) == len(set(names)) and [form.role for form in benchmark.forms].count("ours") == 1
        assert {aim.against for aim in benchmark.aims} <= set(names)
        assert {aim.without for aim in benchmark.aims} <= {*names, None}
        assert {aim.series for aim in benchmark.aims} <= {*SERIES, None}
        assert {form.equals for form in benchmark.forms} <= {*names, "", None}
    for series in SERIES.values():
        assert set(series.forms) <= {form.name for form in BENCHMARKS[series.benchmark].forms}
        assert hasattr(TINY, series.size)
