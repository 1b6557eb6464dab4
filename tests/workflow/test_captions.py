"""Every figure of every study has a caption of its own in the report."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from jinja2 import Template
from support.workflow import REPOSITORY

FIGURES = sorted(
    (path.parents[1].name, path.stem)
    for path in REPOSITORY.glob("src/stillhouse/studies/*/figures/*.py")
    if path.stem not in ("__init__", "variants")
)


def caption(study: str, figure: str) -> str:
    """The text that the report shows beside a figure."""
    template = Template((REPOSITORY / f"docs/captions/{study}.rst").read_text())
    return template.render(snakemake=SimpleNamespace(wildcards=SimpleNamespace(figure=figure))).strip()


def test_no_two_figures_share_a_caption() -> None:
    assert len({caption(*figure) for figure in FIGURES}) == len(FIGURES) > 20


@pytest.mark.parametrize(("study", "figure"), FIGURES)
def test_each_figure_has_a_caption(study: str, figure: str) -> None:
    assert len(caption(study, figure)) > 50
