"""The section and the tables: what they claim is what the items say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from stillhouse.runtime.commands import parse_settings
from stillhouse.studies.latentwire.comparisons import GOLD_NLL, load_evaluations, same_bytes
from stillhouse.studies.latentwire.report import FIGURES, ReportStep, main
from stillhouse.studies.latentwire.results import measure
from tests.latentwire.fake_results import READERS, fake_evaluation


def report(tmp_path: Path, **options: object) -> tuple[str, Path, Path]:
    """The section, the tables' directory and the results of a fake pair."""
    results = fake_evaluation(tmp_path / "evaluation", **options)  # type: ignore[arg-type]
    section, tables = tmp_path / "section.md", tmp_path / "tables"
    main(parse_settings(ReportStep, [f"results=[{results}]", f"section={section}", f"tables={tables}"]))
    return section.read_text(), tables, results


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The report of every arm and channel, made once."""
    return report(tmp_path_factory.mktemp("default"))


def read(table: Path) -> list[dict[str, str]]:
    with table.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("skill", "words"),
    [(1.5, "**beats** the text of the same bytes"), (0.05, "**does not beat** the text of the same")],
)
def test_the_section_says_plainly_whether_the_latent_beats_its_bytes(tmp_path: Path, skill: float, words: str) -> None:
    section, _, results = report(tmp_path, conditions=("latent",), latent_skill=skill)
    findings = re.findall(r"^- `(\w+)`: `latent` in int8.*$", section, re.MULTILINE)
    assert findings == list(READERS)
    assert section.count(words) == len(READERS)
    (evaluation,) = load_evaluations([results])
    comparison = same_bytes(evaluation, READERS[0])
    assert comparison and f"F1 {100 * comparison.difference:.1f} [" in section
    nll = same_bytes(evaluation, READERS[1], GOLD_NLL)
    assert nll and f"Its gold NLL differs by {nll.difference:.3f} [" in section


def test_a_wire_file_that_is_longer_than_its_text_is_called_no_compression(tmp_path: Path) -> None:
    section, _, _ = report(tmp_path, conditions=("latent+length-16",))
    assert "no compression at all: the text itself takes fewer bytes" in section


def test_every_figure_and_table_is_in_the_section(default: tuple[str, Path, Path]) -> None:
    section, tables, _ = default
    assert re.findall(r"figures/latentwire/(\w+)\.png", section) == list(FIGURES)
    for name in ("arms", "paired", "curve", "combined", "channels"):
        assert (tables / f"{name}.md").read_text().strip() in section
        assert (tables / f"{name}.tex").read_text().startswith("\\begin{table}")
        assert read(tables / f"{name}.csv")


def test_the_curve_has_every_channel_in_every_format_with_its_bytes(default: tuple[str, Path, Path]) -> None:
    _, tables, _ = default
    rows = read(tables / "curve.csv")
    assert len(rows) == len(READERS) * 3 * 4
    for row in rows:
        assert float(row["token_ratio"]) == pytest.approx(150 / int(row["length"]))
        assert float(row["byte_ratio"]) == pytest.approx(700 / float(row["bytes"]))
        assert float(row["difference"]) == pytest.approx(float(row["f1"]) - float(row["text_f1"]))


def test_the_first_token_counts_at_1_and_at_5_by_the_rank_of_the_best_gold_answer(tmp_path: Path) -> None:
    results = fake_evaluation(tmp_path, conditions=("latent",), arms=("full_text",), items=8)
    items = load_evaluations([results])[0].items
    rows = items[(items["arm"] == "full_text") & (items["reader"] == READERS[0])]
    (found,) = measure(rows.assign(first_token_rank=[1, 2, 5, 5, 6, 6, 40, 1]))
    assert found.first_at_1 and found.first_at_5
    assert (found.first_at_1.value, found.first_at_5.value) == (0.25, 0.625)


def test_the_smallest_choice_of_arms_still_has_a_section(tmp_path: Path) -> None:
    section, _, _ = report(tmp_path, arms=("full_text",), conditions=("latent",))
    assert section.count("the latent arm was not run") == len(READERS)
    section, _, _ = report(tmp_path / "other", arms=("latent",), conditions=("latent",))
    assert section.count("is not compared with its bytes") == len(READERS)


def test_notes_name_what_was_left_out_and_how_checkpoints_were_chosen(default: tuple[str, Path, Path]) -> None:
    section, _, _ = default
    assert "left out because their text is too long: 3 of test, 1 of validation" in section
    assert "chosen by the gold answer's NLL on the validation split" in section
    assert "As published" not in section
