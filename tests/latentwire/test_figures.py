"""The figures: made for every configuration, the same bytes when remade, from the right items."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.latentwire.comparisons import (
    EXACT,
    F1,
    GOLD_NLL,
    arm_entries,
    compare,
    entries,
    estimate,
    headline,
    load_evaluations,
    rival,
    same_bytes,
)
from stillhouse.studies.latentwire.config import ARMS
from stillhouse.studies.latentwire.figures import CurvesStep, channel_styles
from stillhouse.studies.latentwire.figures.diagnostics import draw_spectrum, read_looks
from tests.latentwire.fake_results import READERS, fake_channel, fake_evaluation

FROM_EVALUATIONS = ("f1_vs_bytes", "arms", "first_token")
FROM_TRAINING = ("diagnostics", "training")
Drawn = Callable[[str], tuple[bytes, bytes]]
PACKAGE = "stillhouse.studies.latentwire.figures"


def draw(name: str, output: Path, **inputs: list[Path]) -> tuple[bytes, bytes]:
    """Run a figure as the workflow does; returns its PNG and SVG."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    lists = [f"{key}=[{','.join(map(str, paths))}]" for key, paths in inputs.items()]
    step = CurvesStep if name in FROM_TRAINING else FigureStep
    module.main(parse_settings(step, [*lists, f"output={output}"]))
    return output.read_bytes(), output.with_suffix(".svg").read_bytes()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_evaluation(tmp_path_factory.mktemp("seeds"), "other", conditions=("latent",), seeds=(1, 2, 3))


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("channels")
    return [fake_channel(folder / c / str(seed), c, seed) for c in ("latent", "prefix_kd") for seed in (1, 2)]


@pytest.fixture(scope="module")
def first(results: Path, channels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Each figure of one pair, drawn once for all tests."""
    folder = tmp_path_factory.mktemp("first")

    @cache
    def drawn(name: str) -> tuple[bytes, bytes]:
        inputs = {"channels": channels} if name in FROM_TRAINING else {"results": [results]}
        return draw(name, folder / f"{name}.png", **inputs)

    return drawn


@pytest.mark.parametrize("name", [*FROM_EVALUATIONS, *FROM_TRAINING])
def test_a_figure_has_the_same_bytes_when_it_is_remade(
    name: str, first: Drawn, results: Path, channels: list[Path], tmp_path: Path
) -> None:
    png, svg = first(name)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
    inputs = {"channels": channels} if name in FROM_TRAINING else {"results": [results]}
    assert (png, svg) == draw(name, tmp_path / "again.png", **inputs)


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
def test_a_figure_shows_several_pairs_and_seeds(
    name: str, first: Drawn, results: Path, seeded: Path, tmp_path: Path
) -> None:
    one, _ = first(name)
    two, _ = draw(name, tmp_path / "two.png", results=[results, seeded])
    assert int.from_bytes(two[20:24], "big") > int.from_bytes(one[20:24], "big")  # the PNG's height


@pytest.mark.parametrize("name", FROM_EVALUATIONS)
@pytest.mark.parametrize("arms", [("latent",), ("full_text",), ("latent", "byte_budget_cut", "agreement")])
def test_a_figure_is_made_for_the_smallest_choice_of_arms(name: str, arms: tuple[str, ...], tmp_path: Path) -> None:
    found = fake_evaluation(tmp_path / "evaluation", conditions=("latent",), arms=arms)  # type: ignore[arg-type]
    assert draw(name, tmp_path / "figure.png", results=[found])[0].startswith(b"\x89PNG")


def test_the_diagnostics_figure_is_made_without_a_look(tmp_path: Path) -> None:
    channel = fake_channel(tmp_path / "channel", "latent")
    (channel / "diagnostics.jsonl").write_text("")
    write_manifest(channel)
    assert draw("diagnostics", tmp_path / "figure.png", channels=[channel])[0].startswith(b"\x89PNG")


def test_the_spectrum_of_z_stands_beside_those_of_the_prefixes_and_the_embeddings(channels: list[Path]) -> None:
    looks = [read_looks(path) for path in channels]
    axes = Figure().subplots()
    draw_spectrum(axes, looks, READERS[0], channel_styles([one.condition for one in looks]))
    lines, labels = axes.get_legend_handles_labels()
    assert labels == ["the texts' embeddings", "latent", "Z of latent", "prefix_kd", "Z of prefix_kd"]
    row = looks[0].rows[-1]
    reader = row.readers[READERS[0]]
    for line, shares in zip(
        lines, (reader.embedding_explained, reader.prefix_explained, row.latent_explained), strict=False
    ):
        assert list(line.get_ydata()) == [100 * share for share in shares]  # type: ignore[attr-defined]


def test_a_metrics_file_without_a_readers_curve_is_named(tmp_path: Path) -> None:
    channel = fake_channel(tmp_path / "channel", "latent")
    (channel / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write_manifest(channel)
    with pytest.raises(UserError, match=r"channel/metrics\.jsonl: has no column 'ce/smollm2_135m'"):
        draw("training", tmp_path / "figure.png", channels=[channel])


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/results\.json: does not exist"):
        draw("arms", tmp_path / "arms.png", results=[tmp_path / "nowhere" / "results.json"])


def test_every_arm_of_a_reader_stands_once_with_the_budget_that_the_latent_takes(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    for reader in READERS:
        found = arm_entries(evaluation, reader)
        assert len({one.arm for one in found}) == len(found)
        assert {one.arm for one in found} <= set(ARMS)
        latent = headline(evaluation, reader)
        assert latent and latent.bytes == 560
        budgets = {one.arm: one.first.budget for one in found if one.first.budget}
        assert {size for arm, size in budgets.items() if arm.startswith("byte")} == {560}
        assert {size for arm, size in budgets.items() if arm.startswith("token")} == {8}


def test_every_latent_is_compared_with_the_text_of_its_own_bytes(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    latents = entries(evaluation, "latent", READERS[0])
    assert len(latents) == 3 * 4
    for one in latents:
        text = rival(evaluation, "byte_budget_compressed", one)
        assert text and text.first.budget == one.bytes


def test_estimates_and_differences_are_those_of_the_items(results: Path) -> None:
    (evaluation,) = load_evaluations([results])
    latent = headline(evaluation, READERS[0])
    assert latent
    text = rival(evaluation, "byte_budget_cut", latent)
    assert text
    rows = [evaluation.rows[*one.first.subject.key, "test"].set_index("item_id") for one in (latent, text)]
    found = estimate(evaluation, latent, F1)
    assert found and found.value == pytest.approx(rows[0]["f1"].mean()) and found.n == 40
    difference = compare(evaluation, latent, text, F1)
    assert difference and difference.difference == pytest.approx((rows[0]["f1"] - rows[1]["f1"]).mean())
    nll = compare(evaluation, latent, text, GOLD_NLL)
    per_token = [frame["gold_nll"].sum() / frame["gold_tokens"].sum() for frame in rows]
    assert nll and nll.difference == pytest.approx(per_token[0] - per_token[1])


def test_a_known_advantage_is_found_and_nothing_is_claimed_of_an_arm_against_itself(tmp_path: Path) -> None:
    chosen = {"conditions": ("latent",), "arms": ("latent", "byte_budget_compressed")}
    good, bad = load_evaluations(
        [fake_evaluation(tmp_path / f"{skill}", latent_skill=skill, **chosen) for skill in (1.5, 0.05)]
    )
    verdicts = [same_bytes(one, READERS[0]) for one in (good, bad)]
    assert [one.verdict for one in verdicts if one] == ["higher", "lower"]
    latent = headline(good, READERS[0])
    assert latent
    same = compare(good, latent, latent, EXACT)
    assert same and same.difference == 0 and same.low < 0 < same.high


def test_seeds_widen_what_is_said_of_a_channel(seeded: Path) -> None:
    (evaluation,) = load_evaluations([seeded])
    latent = headline(evaluation, READERS[0])
    assert latent and [one.seed for one in latent.measurements] == [1, 2, 3]
    comparison = same_bytes(evaluation, READERS[0])
    assert comparison and comparison.low < comparison.difference < comparison.high
