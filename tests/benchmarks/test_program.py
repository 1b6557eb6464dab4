"""The whole program on a tiny scale: what is measured reaches the results file and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from benchmarks.__main__ import Run, measure_parts
from benchmarks.dag_scale import REPOSITORY, SIZES, configuration, measure_start
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


def test_the_workflow_s_benchmark_has_every_study_at_6_models_20_conditions_5_seeds_and_a_sweep_over_each() -> None:
    merged = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    update_config(merged, configuration(SIZES[-1]))
    found = load_configuration(merged, [], {})
    assert len(found.studies) == 5
    for name in found.studies:
        study = getattr(found, name)
        subjects = study.pairs if name == "latentwire" else study.models
        trained = [condition for condition in study.conditions if condition not in study.untrained]
        assert (len(subjects), len(trained), len(study.seeds), len(study.sweeps)) == (6, 20, 5, 20)
        assert len(study.trained_conditions) == 20 * (1 + SIZES[-1].points)


@pytest.mark.slow
def test_the_start_of_snakemake_is_measured_on_a_workflow_without_work() -> None:
    start = measure_start()
    assert start.seconds > 0 and (start.peak_memory_mib or 0) > 10
