"""The whole program on a tiny scale: what is measured reaches the results file and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from benchmarks.__main__ import Run, measure_parts
from benchmarks.dag_scale import REPOSITORY, configuration
from benchmarks.results import read_results
from benchmarks.scale import TINY
from benchmarks.scaling import SERIES
from stillhouse.studies.configuration import load_configuration

# One worker: a server that has imported everything forks the processes that measure memory.
pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.mark.slow
def test_a_run_leaves_results_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERIES, "adapters", replace(SERIES["adapters"], values=(2, 16)))
    page = tmp_path / "README.md"
    measure_parts(Run(only=("adapters",), rounds=1, results=tmp_path / "results", page=page), TINY)
    [results] = read_results(tmp_path / "results")
    assert results.took.keys() == {"adapters"} and results.device.operations_per_second > 1e9
    curves = results.series["adapters"].curves
    assert [point.value for point in curves["together"]] == [2, 16]
    peaks = [point.peak_memory_mib or 0 for point in curves["together"]]
    assert peaks == sorted(peaks) and peaks[-1] > peaks[0]
    text = page.read_text()
    assert "### How cost grows" in text and "delta_activations" in text


def test_the_large_configuration_of_the_workflow_s_benchmark_is_a_valid_one() -> None:
    merged = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    update_config(merged, configuration(2))
    study = load_configuration(merged, [], {}).context_distillation
    assert (len(study.models), len(study.seeds), len(study.sweeps)) == (6, 5, 20)
