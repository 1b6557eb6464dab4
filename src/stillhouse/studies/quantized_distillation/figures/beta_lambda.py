"""Step program: `beta_lambda.png`, a heat map of KL to the teacher on validation over beta and lambda."""

from __future__ import annotations

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.heat_maps import draw_maps


def main(step: FigureStep) -> None:
    """Draw one map a model, of the largest grid that it has."""
    absent = "Beta and lambda are not swept together: config/experiments/quantized_beta_lambda.yaml does."
    meaning = " β 0: KL(teacher || student), β 1: the reverse; λ: the share of steps on the student's own answers."
    draw_maps(step, "beta_lambda", absent, meaning)


if __name__ == "__main__":
    run_step(FigureStep, main)
