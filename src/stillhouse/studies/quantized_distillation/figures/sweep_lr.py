"""Step program: `sweep_lr.png`, a line for every sweep of learning rates, on validation."""

from __future__ import annotations

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations
from stillhouse.studies.quantized_distillation.sweeps import sweeps

ABSENT = "No learning rates are swept: config/experiments/quantized_learning_rate.yaml does."


def main(step: FigureStep) -> None:
    """Draw the sweeps over these axes alone; `sweep.png` has every one."""
    sweeps(load_evaluations(step.results)).only("learning_rate").draw(step.output, ABSENT)


if __name__ == "__main__":
    run_step(FigureStep, main)
