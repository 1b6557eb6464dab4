"""One style for every figure: colour-blind safe, and byte-identical whenever it is remade.

Figures are drawn without pyplot and without the user's matplotlibrc, in the fonts that matplotlib brings
along, so the same numbers give the same bytes on every machine with the pinned packages. A condition keeps
its colour and its marker through all figures: shape tells apart what colour alone may not. Palette: Okabe
and Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Protocol, runtime_checkable

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stillhouse.runtime.files import atomic_write_bytes

BLACK, GREY = "#000000", "#999999"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)

RC_PARAMS: dict[str, object] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "stillhouse",
}


@runtime_checkable
class Interval(Protocol):
    """A value with its confidence interval, such as `evaluation.statistics.Estimate`."""

    @property
    def value(self) -> float:
        """The point estimate."""

    @property
    def low(self) -> float:
        """The interval's lower end."""

    @property
    def high(self) -> float:
        """The interval's upper end."""


@dataclass(frozen=True)
class ConditionStyle:
    """How one condition is drawn in every figure."""

    colour: str
    marker: str


KNOWN_CONDITIONS = {
    "base_zero_shot": ConditionStyle(GREY, "o"),
    "base_few_shot": ConditionStyle(BLACK, "s"),
    "baseline": ConditionStyle(BLUE, "^"),
    "online_v1": ConditionStyle(VERMILLION, "D"),
    "lora_teacher": ConditionStyle(GREEN, "v"),
    "zeroshot_teacher": ConditionStyle(SKY, "P"),
    "shuffled_answers": ConditionStyle(PURPLE, "X"),
    "fewshot_teacher": ConditionStyle(ORANGE, "D"),
    "kl_t1": ConditionStyle(GREEN, "<"),
    "kl_t2": ConditionStyle(SKY, "<"),
    "kl_t4": ConditionStyle(BLACK, "<"),
    "random_k": ConditionStyle(YELLOW, "*"),
    "question_only_shots": ConditionStyle(PURPLE, "h"),
    "wrong_exemplars": ConditionStyle(ORANGE, "p"),
    "lens": ConditionStyle(VERMILLION, "s"),
    "no_resample": ConditionStyle(BLUE, "P"),
    "mse_only": ConditionStyle(GREEN, "s"),
    "unfrozen": ConditionStyle(PURPLE, "v"),
    "teacher": ConditionStyle(BLACK, "*"),
    "ptq": ConditionStyle(GREY, "X"),
    "gptq": ConditionStyle(SKY, "p"),
    "awq": ConditionStyle(PURPLE, "P"),
    "off_policy": ConditionStyle(BLUE, "o"),
    "on_policy": ConditionStyle(VERMILLION, "^"),
    "mixed_policy": ConditionStyle(GREEN, "D"),
    "teacher_samples": ConditionStyle(ORANGE, "^"),
    "off_policy_beside": ConditionStyle(BLUE, "v"),
    "on_policy_beside": ConditionStyle(VERMILLION, "v"),
}
# Markers that no known condition has: a condition of the user's own is never taken for one of ours.
SPARE_MARKERS = (">", "d", "H", "8", "1", "2", "3", "4")


def condition_style(condition: str) -> ConditionStyle:
    """The colour and marker of a condition; an unknown one gets a pair that depends on its name alone."""
    if condition in KNOWN_CONDITIONS:
        return KNOWN_CONDITIONS[condition]
    number = int.from_bytes(hashlib.sha256(condition.encode()).digest()[:8], "big")
    marker_number, colour_number = divmod(number, len(PALETTE))
    return ConditionStyle(PALETTE[colour_number], SPARE_MARKERS[marker_number % len(SPARE_MARKERS)])


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; what is drawn in the block has the house style."""
    with _house_style():
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        yield drawing


def save_figure(drawing: Figure, png_path: Path) -> None:
    """Write the figure as PNG, and as SVG beside it; both are rendered before either is written.

    Raises `UserError` where the disk is full or the folder cannot be written.
    """
    rendered: dict[Path, bytes] = {}
    with _house_style():
        # Laid out once: the constrained layout moves a little further with every drawing.
        drawing.draw_without_rendering()
        drawing.set_layout_engine("none")
        for path, metadata in (
            (png_path, {"Software": None}),
            (png_path.with_suffix(".svg"), {"Date": None, "Creator": None}),
        ):
            buffer = io.BytesIO()
            drawing.savefig(buffer, format=path.suffix[1:], metadata=metadata)
            rendered[path] = buffer.getvalue()
    for path, data in rendered.items():
        atomic_write_bytes(path, data)


def draw_frame(drawing: Figure, title: str, note: str) -> None:
    """The message above a figure and the small print below it, wrapped to its width."""
    width = int(drawing.get_figwidth() * 17)
    drawing.suptitle(fill(title, int(width * 0.6)), x=0.01, ha="left", fontsize=11, fontweight="bold")
    drawing.supxlabel(fill(note, width), x=0.01, ha="left", fontsize=8)


def draw_notice(output: Path, text: str) -> None:
    """A figure that says why there is nothing to draw, so that a small configuration still makes every target."""
    with figure(7, 1.2) as drawing:
        drawing.text(0.5, 0.5, text, ha="center", va="center")
        save_figure(drawing, output)


def error_bars(estimates: Sequence[Interval]) -> NDArray[np.float64]:
    """The lengths that matplotlib wants as `yerr`: [2, n], from the value down to low and up to high."""
    lengths = [(estimate.value - estimate.low, estimate.high - estimate.value) for estimate in estimates]
    # Rounding may put a bound a hair on the wrong side of the value; matplotlib refuses negative lengths.
    return np.maximum(np.array(lengths, dtype=np.float64).reshape(-1, 2).T, 0.0)


def _house_style() -> AbstractContextManager[None]:
    return matplotlib.style.context(["default", RC_PARAMS])
