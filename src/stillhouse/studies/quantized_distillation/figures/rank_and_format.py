"""Step program: `rank_and_format.png`, heat maps over LoRA rank and policy, and over weight format and policy."""

from __future__ import annotations

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.heat_maps import draw_maps


def main(step: FigureStep) -> None:
    """Draw two maps a model, or the one of what was swept."""
    absent = "Ranks and formats are not swept on both policies: config/experiments/quantized_rank_and_format.yaml does."
    draw_maps(step, "rank_and_format", absent, " λ: the share of steps on the student's own answers.")


if __name__ == "__main__":
    run_step(FigureStep, main)
