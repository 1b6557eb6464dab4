"""Step program: train one lens and keep its checkpoints.

The loop is the shared one: this program gives it the lens, the objective, and parameter groups whose learning rates
follow the lens's own schedules. Resumable state lies in `work/<fingerprint>/`, and the output directory appears whole
when the last step is done.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from pydantic import model_validator
from torch import nn

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.models.precision import default_device, resolve_precision
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.runtime.seeds import seed_everything
from stillhouse.studies.consistency_lens.data import ActivationData, CachedExamples, Examples, TokenExamples
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.objective import LensObjective
from stillhouse.studies.consistency_lens.run_settings import CheckpointSettings, RunSettings
from stillhouse.studies.consistency_lens.schedules import Schedule, parse_schedule
from stillhouse.training.loop import train
from stillhouse.training.optimizers import ParameterGroup
from stillhouse.training.processes import process_state, staged_output
from stillhouse.training.tracking import METRICS_FILE, read_metrics

MODULE = "stillhouse.studies.consistency_lens.train"
PATHS = {"model", "activations", "tokens", "output", "work"}
VALIDATION_LOSS = "validation/loss"


class TrainStep(StrictModel):
    """The step's command line: `activations` for a run on cached ones, `tokens` for one that computes its own."""

    model: Path
    activations: Path | None = None
    tokens: Path | None = None
    output: Path
    work: Path
    condition: str
    seed: int
    run: RunSettings
    tracking: TrackingSettings
    trust_remote_code: bool

    @property
    def examples(self) -> Path:
        """The directory that the examples come from."""
        path = self.activations if self.run.activations == "cached" else self.tokens
        assert path is not None
        return path

    @model_validator(mode="after")
    def has_what_it_reads(self) -> TrainStep:
        """Refuse a run without the directory that its examples come from."""
        needed = "activations" if self.run.activations == "cached" else "tokens"
        if getattr(self, needed) is None:
            raise ValueError(f"run.activations {self.run.activations} needs {needed}=<directory>")
        return self


def main(step: TrainStep) -> None:
    """Train from the newest state of this very run, and put the kept checkpoints into place."""
    inputs = {"model": step.model, "examples": step.examples}
    verify_manifest(step.model)
    precision = resolve_precision(step.run.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    if process_state().is_main_process:
        log_to_file(work_dir)
    run, settings = step.run, step.run.training
    seed = step.seed + run.seed_offset
    with RunRecord(MODULE, step, inputs) as record:
        seed_everything(seed)
        data = ActivationData(open_examples(step, "train"), seed)
        validation = ActivationData(open_examples(step, "validation"), seed)
        lens = Lens.build(step.model, run.lens, settings.precision, trust_remote_code=step.trust_remote_code)
        steps_per_epoch = len(data) / settings.batch_size
        objective = LensObjective(run.loss, run.schedules, steps_per_epoch)
        groups = parameter_groups(lens, run, steps_per_epoch)
        logger.info(
            "%s: %d activations, %d steps of %d (%.1f epochs); trained: %s",
            step.condition,
            len(data),
            settings.steps,
            settings.batch_size,
            settings.steps / steps_per_epoch,
            ", ".join(f"{g.name} ({sum(p.numel() for p in g.parameters.values()):,})" for g in groups),
        )
        with staged_output(step.output) as staging:
            result = train(
                lens,
                objective,
                data,
                settings,
                work_dir=work_dir,
                output_dir=staging,
                seed=seed,
                groups=groups,
                tracking=step.tracking,
                run_name=f"{step.condition}-seed-{step.seed}",
                validate=ValidationLoss(objective, validation, run),
            )
            if process_state().is_main_process:
                kept = keep_checkpoints(staging, run.checkpoints, settings.saved_steps)
                record.add(training=asdict(result), examples=len(data), checkpoints=kept)
                write_manifest(staging)
                record.write(staging / "run.json")


def open_examples(step: TrainStep, split: str) -> Examples:
    """The examples of a split; activations of another model, layer or position policy are refused."""
    reader = CachedExamples if step.run.activations == "cached" else TokenExamples
    return reader(step.examples, split, step.run.extraction, step.model)


def parameter_groups(lens: Lens, run: RunSettings, steps_per_epoch: float) -> list[ParameterGroup]:
    """One group for each trained part: its multiplier, the run's learning-rate schedule, its own unfreezing."""
    learning_rate = parse_schedule(run.schedules.learning_rate)

    def factor(unfreezing: Schedule, step: int) -> float | None:
        own = unfreezing.value(step, steps_per_epoch)
        return own * learning_rate.value(step, steps_per_epoch) if own else None

    parts = run.lens.trained
    return [
        ParameterGroup(
            name,
            parameters,
            parts[name].learning_rate_multiplier,
            partial(factor, parse_schedule(parts[name].unfreezing)),
        )
        for name, parameters in lens.part_parameters().items()
    ]


class ValidationLoss:
    """The loss and its terms on the first validation examples, without Gumbel noise."""

    def __init__(self, objective: LensObjective, data: ActivationData, run: RunSettings) -> None:
        self.objective, self.data = objective, data
        self.items = min(run.checkpoints.validation_items, len(data))
        self.budget = run.training.micro_batch_tokens
        self.bf16 = resolve_precision(run.training.precision, default_device()) == "bf16"

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """Means over the examples, named `validation/...`; the model's mode is restored."""
        assert isinstance(model, Lens)
        device = next(model.parameters()).device
        sums: dict[str, float] = defaultdict(float)
        training = model.training
        model.eval()
        for batch in self.data.micro_batches(range(self.items), self.budget):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                terms = self.objective.validation(model, batch.to(device))
            for name, value in {"loss": terms.total, **terms.terms}.items():
                sums[name] += float(value)
        model.train(training)
        return {f"validation/{name}": value / self.items for name, value in sums.items()}


def keep_checkpoints(output: Path, settings: CheckpointSettings, saved_steps: tuple[int, ...]) -> list[int]:
    """Remove the checkpoints that are neither among the best nor among the newest; returns the steps that stay."""
    if settings.best is None and settings.last is None:
        return list(saved_steps)
    losses = {
        int(row["step"]): row[VALIDATION_LOSS] for row in read_metrics(output / METRICS_FILE) if VALIDATION_LOSS in row
    }
    if missing := [step for step in saved_steps if step not in losses]:
        raise UserError(f"{output / METRICS_FILE}: has no {VALIDATION_LOSS} of step {missing[0]}: train again")
    best = sorted(saved_steps, key=lambda step: (losses[step], step))[: settings.best or 0]
    kept = {*best, *sorted(saved_steps)[len(saved_steps) - (settings.last or 0) :]}
    for step in saved_steps:
        if step not in kept:
            shutil.rmtree(output / f"checkpoint-{step}")
    return sorted(kept)


if __name__ == "__main__":
    run_step(TrainStep, main)
