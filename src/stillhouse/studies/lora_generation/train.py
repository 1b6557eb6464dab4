"""Step program: train one generator on a model's teacher adapters, and keep its checkpoints.

The condition's settings decide what is compared; the loop is the shared one. Teachers' delta activations come from the
cache, and generated adapters' are computed with the probes that the cache records. Resumable state lies in
`work/<fingerprint>/`, and the output directory appears whole when the last step is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.models.lora_tensors import check_fits
from stillhouse.models.precision import default_device, resolve_precision
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import verify_manifest, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.runtime.seeds import seed_everything
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.deltas import Behaviour
from stillhouse.studies.lora_generation.examples import AdapterExamples, rows_of
from stillhouse.studies.lora_generation.generator_settings import RunSettings, TextSettings
from stillhouse.studies.lora_generation.generators import Generator, GeneratorPlan, write_plan
from stillhouse.studies.lora_generation.objective import GeneratorObjective, Sizes
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from stillhouse.training.loop import train
from stillhouse.training.processes import process_state, staged_output

MODULE = "stillhouse.studies.lora_generation.train"
PATHS = {"model", "adapters", "deltas", "encoder", "output", "work", "embeddings"}


class TrainStep(StrictModel):
    """The step's command line: `embeddings` is where prompt embeddings are kept, for all runs."""

    model: Path
    adapters: Path
    deltas: Path
    encoder: Path
    output: Path
    work: Path
    embeddings: Path
    model_name: str
    condition: str
    seed: int
    run: RunSettings
    shards: ShardSettings
    text: TextSettings
    tracking: TrackingSettings
    trust_remote_code: bool = False


def main(step: TrainStep) -> None:
    """Train from the newest state of this very run, and put the checkpoints into place."""
    inputs = {name: getattr(step, name) for name in ("model", "adapters", "deltas", "encoder")}
    verify_manifest(step.model)
    precision = resolve_precision(step.run.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    if process_state().is_main_process:
        log_to_file(work_dir)
    run, seed = step.run, step.seed + step.run.seed_offset
    with RunRecord(MODULE, step, inputs) as record:
        seed_everything(seed)
        deltas = DeltaCache.load(step.deltas)
        behaviour = deltas.behaviour(step.model, step.trust_remote_code)
        encoder = PromptEncoder(step.encoder, step.text, step.embeddings)
        data = open_examples(step, "train", deltas, encoder, behaviour)
        check_fits(data.layout, behaviour.model, step.adapters / data.rows[0].name)
        plan = GeneratorPlan(
            generator=run.generator,
            tokens=run.tokens,
            layout=data.layout,
            base_model=step.model_name,
            text_key=encoder.key,
            vectors=step.text.vectors,
            width=encoder.width,
            guide=len(deltas.base) if run.losses.guided else None,
        )
        generator = Generator(plan)
        generator.fit(data.adapters(), data.deltas, data.conditions)
        objective = GeneratorObjective(run.losses, behaviour, Sizes.of(data), run.generator.prompts, seed)
        validate = None
        if step.shards.validation_shards:
            validation = open_examples(step, "validation", deltas, encoder, behaviour)
            validate = ValidationLoss(objective, validation, run)
        parameters = sum(parameter.numel() for parameter in generator.parameters())
        logger.info(
            "%s: %d adapters of %d values in %d tokens; %d parameters",
            step.condition,
            len(data),
            data.layout.values,
            generator.tokeniser.tokens,
            parameters,
        )
        with staged_output(step.output) as staging:
            result = train(
                generator,
                objective,
                data,
                run.training,
                work_dir=work_dir,
                output_dir=staging,
                seed=seed,
                tracking=step.tracking,
                run_name=f"{step.condition}-seed-{step.seed}",
                validate=validate,
            )
            if process_state().is_main_process:
                write_plan(staging, plan)
                record.add(training=asdict(result), adapters=[row.name for row in data.rows], parameters=parameters)
                write_manifest(staging)
                record.write(staging / "run.json")


def open_examples(
    step: TrainStep,
    role: Literal["train", "validation"],
    deltas: DeltaCache,
    encoder: PromptEncoder,
    behaviour: Behaviour,
) -> AdapterExamples:
    """The adapters to learn from, or to choose a checkpoint by."""
    rows = rows_of(step.adapters, role, step.shards, step.run.held_out_tasks)
    prompts = step.run.generator.prompts
    return AdapterExamples(step.adapters, rows, deltas, encoder, prompts, behaviour.probes.tokens)


class ValidationLoss:
    """The loss and every distance on the validation shards' adapters, as `validation/<name>`."""

    def __init__(self, objective: GeneratorObjective, data: AdapterExamples, run: RunSettings) -> None:
        self.objective, self.data = objective, data
        self.budget = run.training.micro_batch_tokens
        self.bf16 = resolve_precision(run.training.precision, default_device()) == "bf16"

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """Means over the adapters; the model's mode is restored."""
        device = next(model.parameters()).device
        sums: dict[str, float] = defaultdict(float)
        training = model.training
        model.eval()
        for batch in self.data.micro_batches(range(len(self.data)), self.budget):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                terms = self.objective.validation(model, batch.to(device))
            for name, value in {"loss": terms.total, **terms.terms}.items():
                sums[name] += float(value)
        model.train(training)
        return {f"validation/{name}": value / len(self.data) for name, value in sums.items()}


if __name__ == "__main__":
    run_step(TrainStep, main)
