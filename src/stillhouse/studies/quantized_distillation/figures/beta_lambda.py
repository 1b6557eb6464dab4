"""Step program: `beta_lambda.png`, a heat map of every sweep of beta and lambda, on validation."""

from __future__ import annotations

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import run_step
from stillhouse.studies.quantized_distillation.comparisons import load_evaluations
from stillhouse.studies.quantized_distillation.sweeps import sweeps

ABSENT = "Beta and lambda are not swept together: config/experiments/quantized_beta_lambda.yaml does."


def main(step: FigureStep) -> None:
    """Draw the sweeps over these axes alone; `sweep.png` has every one."""
    sweeps(load_evaluations(step.results)).only("beta", "on_policy_share").draw(step.output, ABSENT)


if __name__ == "__main__":
    run_step(FigureStep, main)
