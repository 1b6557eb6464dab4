"""Tables: rounded for readers, whole for programs, escaped for LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
import math
from types import SimpleNamespace

import pytest

from stillhouse.reporting.tables import Column, Table, escape_latex, format_estimate, write_table

ESTIMATE = SimpleNamespace(value=0.42, low=0.3101, high=0.5299)
TABLE = Table(
    name="accuracy",
    caption="Accuracy of 100% of R&D, condition_by_model",
    columns=(
        Column("condition"),
        Column("n", "integer"),
        Column("nll", "estimate", heading="NLL per token"),
        Column("accuracy", "percent_estimate", digits=1),
        Column("p", "p_value", digits=3),
    ),
    rows=(
        ("online_v1 #1", 1319, ESTIMATE, ESTIMATE, 0.00001),
        ("[a|b]", 64, None, SimpleNamespace(value=math.nan, low=math.nan, high=math.nan), 0.25),
    ),
)


def test_an_estimate_is_shown_with_its_interval():
    assert format_estimate(ESTIMATE) == "0.42 [0.31, 0.53]"
    assert format_estimate(ESTIMATE, digits=1, scale=100) == "42.0 [31.0, 53.0]"


def test_a_value_that_rounds_to_zero_has_no_sign():
    assert format_estimate(SimpleNamespace(value=-0.001, low=-0.2, high=0.1)) == "0.00 [-0.20, 0.10]"


def test_markdown_rounds_aligns_and_escapes():
    assert TABLE.to_markdown().splitlines() == [
        "Accuracy of 100% of R&D, condition_by_model",
        "",
        "| condition | n | NLL per token | accuracy | p |",
        "| :-- | --: | --: | --: | --: |",
        "| online_v1 #1 | 1,319 | 0.42 [0.31, 0.53] | 42.0 [31.0, 53.0] | < 0.001 |".replace("<", "&lt;"),
        "| [a\\|b] | 64 | – | – | 0.250 |",  # noqa: RUF001
    ]


def test_csv_keeps_every_digit_and_gives_an_estimate_three_columns():
    header, first, second = csv.reader(io.StringIO(TABLE.to_csv()))
    assert header == [
        "condition",
        "n",
        "nll",
        "nll_low",
        "nll_high",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "p",
    ]
    assert first == ["online_v1 #1", "1319", "0.42", "0.3101", "0.5299", "0.42", "0.3101", "0.5299", "1e-05"]
    assert second == ["[a|b]", "64", "", "", "", "", "", "", "0.25"]


def test_latex_is_a_booktabs_table_with_everything_escaped():
    latex = TABLE.to_latex()
    assert r"\caption{Accuracy of 100\% of R\&D, condition\_by\_model}" in latex
    assert r"\label{tab:accuracy}" in latex
    assert r"\begin{tabular}{lrrrr}" in latex
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"online\_v1 \#1 & 1,319 & 0.42 {[}0.31, 0.53{]} & 42.0 {[}31.0, 53.0{]} & \textless{} 0.001 \\" in latex
    assert r"{[}a|b{]} & 64 & -- & -- & 0.250 \\" in latex, "a row must not begin with a bare bracket"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b%c#d&e", r"a\_b\%c\#d\&e"),
        ("${x}", r"\$\{x\}"),
        ("\\_", r"\textbackslash{}\_"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_escapes_each_special_character_once(text, escaped):
    assert escape_latex(text) == escaped


def test_a_table_is_written_three_times(tmp_path):
    paths = write_table(TABLE, tmp_path / "tables")
    assert [path.name for path in paths] == ["accuracy.csv", "accuracy.tex", "accuracy.md"]
    texts = [TABLE.to_csv(), TABLE.to_latex(), TABLE.to_markdown()]
    assert [path.read_text() for path in paths] == texts


def test_a_table_that_cannot_be_written_is_refused_when_it_is_made():
    column = Column("a")
    with pytest.raises(ValueError, match="plain file name"):
        Table("a/b", "", (column,), ())
    with pytest.raises(ValueError, match="share a name"):
        Table("a", "", (column, column), ())
    with pytest.raises(ValueError, match="row 0 has 2 of 1 cells"):
        Table("a", "", (column,), (("x", "y"),))


def test_a_cell_of_the_wrong_kind_is_an_error():
    with pytest.raises(TypeError, match=r"estimates got 0\.5"):
        Table("a", "", (Column("a", "estimate"),), ((0.5,),)).to_markdown()
    with pytest.raises(TypeError, match="numbers got 'x'"):
        Table("a", "", (Column("a", "number"),), (("x",),)).to_markdown()
