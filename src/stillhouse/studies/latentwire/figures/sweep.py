"""Step program: `sweep.png`, the points of every sweep on validation, and the winner that it picks."""

from __future__ import annotations

from stillhouse.reporting.steps import FigureStep
from stillhouse.runtime.commands import run_step
from stillhouse.studies.latentwire.comparisons import load_evaluations
from stillhouse.studies.latentwire.sweeps import sweeps


def main(step: FigureStep) -> None:
    """Draw every sweep of every pair."""
    sweeps(load_evaluations(step.results)).draw(step.output)


if __name__ == "__main__":
    run_step(FigureStep, main)
