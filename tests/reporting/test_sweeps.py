"""Sweeps of every study: grouped by what varies, drawn, and won by what validation says alone."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.reporting.steps import FigureStep, ReportStep
from stillhouse.reporting.sweeps import Score, Sweeps, grids, title
from tests.consistency_lens.fake_results import fake_evaluation as lens
from tests.context_distillation.fake_results import EFFECTS, Effect
from tests.context_distillation.fake_results import fake_evaluation as context
from tests.latentwire.fake_results import fake_evaluation as wire
from tests.lora_generation.fake_results import write_fake_evaluation as generators

# Every study with a sweep of two points, of which validation picks the second: how its evaluation is made.
SWEPT: dict[str, Callable[[Path], Path]] = {
    "context_distillation": lambda folder: context(
        folder,
        conditions=(*EFFECTS, "online_v1+top_k-8", "online_v1+top_k-16"),
        effects=EFFECTS | {"online_v1+top_k-8": Effect(-0.1, 0.8, 0.05), "online_v1+top_k-16": Effect(-0.6, 0.8, 0.05)},
    ),
    "consistency_lens": lambda folder: lens(folder, layers={"lens": 6, "lens+layer-3": 3, "lens+layer-9": 9}),
    "latentwire": lambda folder: wire(folder, conditions=("latent", "latent+length-4", "latent+length-16")),
    "lora_generation": lambda folder: generators(
        folder, conditions=("multi_task", "weight_only", "multi_task+prompts-4", "multi_task+prompts-8")
    ),
}
SCORES = [
    Score("tiny", f"method+top_k-{top_k}+temperature-{temperature}", seed, value + 0.01 * seed)
    for top_k, temperature, value in ((8, 2, 0.5), (8, 10, 0.3), (16, 2, 0.4), (16, 10, 0.35))
    for seed in (1, 3)
]


def test_points_are_grouped_by_subject_condition_and_axes_and_others_are_left_out() -> None:
    scores = [
        *SCORES,
        Score("tiny", "method", 1, 0.0),
        Score("other", "method+top_k-8+temperature-2", 1, 0.1),  # the only point of its model: nothing to pick
        Score("tiny", "method+learning_rate-1e-05", 1, 0.2),
        Score("tiny", "method+learning_rate-0.001", 1, 0.1),
    ]
    found = grids(scores)
    assert [(one.subject, one.axes, len(one.points)) for one in found] == [
        ("tiny", ("top_k", "temperature"), 4),
        ("tiny", ("learning_rate",), 2),
    ]
    assert found[0].picked == "top_k = 8, temperature = 10"
    assert found[0].winner.mean == pytest.approx(0.32) and found[0].winner.spread == pytest.approx(0.01414, abs=1e-4)
    assert found[0].along(1) == ["2", "10"], "by size, not as text"
    assert found[1].along(0) == ["1e-05", "0.001"] and found[1].picked == "learning_rate = 0.001"


def test_the_winner_is_the_mean_s_and_not_a_lucky_seed_s() -> None:
    lucky = [Score("m", "c+k-1", 1, 0.0), Score("m", "c+k-1", 2, 1.0), *(Score("m", "c+k-2", s, 0.4) for s in (1, 2))]
    assert grids(lucky)[0].picked == "k = 2"


def test_the_table_marks_one_winner_a_sweep_and_the_title_names_it() -> None:
    [table] = Sweeps("study", "Loss", grids(SCORES)).tables()
    assert [(row[2], row[6]) for row in table.rows] == [
        ("top_k = 8, temperature = 10", "picked"),
        ("top_k = 16, temperature = 10", None),
        ("top_k = 16, temperature = 2", None),
        ("top_k = 8, temperature = 2", None),
    ]
    assert title(grids(SCORES)) == "Validation picks for method: top_k = 8, temperature = 10"


def test_sweeps_over_one_two_and_three_axes_are_drawn_and_none_is_a_notice(tmp_path: Path) -> None:
    three = [
        Score("tiny", f"method+rank-{rank}+kind-{kind}+share-{share}", 1, rank / 10 + share)
        for rank in (4, 8)
        for kind in ("nf4", "int4")
        for share in (0, 1)
        if (rank, kind, share) != (8, "nf4", 1)  # what was not run stays white
    ]
    one = [Score("tiny", f"{name}+rate-{rate}", 1, rate) for name in ("off", "on") for rate in (0.1, 0.2)]
    drawn = Sweeps("study", "Loss (nats)", grids([*SCORES, *three, *one]))
    drawn.draw(tmp_path / "all.png")
    assert len((tmp_path / "all.png").read_bytes()) > 20_000
    first = (tmp_path / "all.svg").read_bytes()
    drawn.draw(tmp_path / "all.png")
    assert (tmp_path / "all.svg").read_bytes() == first
    Sweeps("study", "Loss", []).draw(tmp_path / "none.png")
    assert (tmp_path / "none.png").exists() and (tmp_path / "none.svg").read_bytes() != first
    assert Sweeps("study", "Loss", []).section() == []


@pytest.mark.parametrize("study", list(SWEPT))
def test_every_study_names_the_winner_of_a_sweep_and_draws_it(study: str, tmp_path: Path) -> None:
    results = SWEPT[study](tmp_path / "evaluation")
    package = f"stillhouse.studies.{study}"
    report = importlib.import_module(f"{package}.report")
    report.main(ReportStep(results=(results,), section=tmp_path / "section.md", tables=tmp_path / "tables"))
    text = (tmp_path / "section.md").read_text()
    assert "### Sweeps" in text and f"figures/{study}/sweep.png" in text
    with (tmp_path / "tables" / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["picked"] for row in rows] == ["picked", ""]
    assert float(rows[0]["validation"]) < float(rows[1]["validation"])
    assert f"validation picks {rows[0]['values']}." in text
    if study in ("context_distillation", "lora_generation"):  # their fakes are told which point is better
        assert rows[0]["values"] in ("top_k = 16", "prompts = 8")
    figure = importlib.import_module(f"{package}.figures.sweep")
    figure.main(FigureStep(results=(results,), output=tmp_path / "sweep.png"))
    assert len((tmp_path / "sweep.png").read_bytes()) > 8_000


@pytest.mark.parametrize("study", list(SWEPT))
def test_a_report_without_a_sweep_says_nothing_of_one(study: str, tmp_path: Path) -> None:
    plain: dict[str, Callable[[Path], Path]] = {
        "context_distillation": context,
        "consistency_lens": lens,
        "latentwire": lambda folder: wire(folder, conditions=("latent", "prefix_kd")),
        "lora_generation": generators,
    }
    results = plain[study](tmp_path / "evaluation")
    report = importlib.import_module(f"stillhouse.studies.{study}.report")
    report.main(ReportStep(results=(results,), section=tmp_path / "section.md", tables=tmp_path / "tables"))
    assert "weep" not in (tmp_path / "section.md").read_text()
    assert not (tmp_path / "tables" / "sweep.csv").exists()
