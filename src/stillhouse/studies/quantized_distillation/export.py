"""Step program: merge a student's selected adapter, convert the weights for real, check what was written.

Without a student the base itself is converted: `ptq`, round to nearest. The exported model is loaded again, and its
logits compared with the fake-quantised model's: `run.json` has the selected step and the largest difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import Precision
from stillhouse.models.export import export_quantized, load_exported
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.quantized_lora import load_student
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord
from stillhouse.studies.quantized_distillation.run_settings import Selection
from stillhouse.training.tracking import METRICS_FILE, read_metrics

MODULE = "stillhouse.studies.quantized_distillation.export"
VALIDATION_KL = "validation_kl"
PROBE = "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9\n"


class ExportStep(StrictModel):
    """The step's command line. student: a training's output directory; None: the base, rounded to nearest."""

    model: Path
    student: Path | None = None
    output: Path
    format: WeightFormat
    selection: Selection = "validation_kl"
    precision: Precision = "auto"
    trust_remote_code: bool = False


def main(step: ExportStep) -> None:
    """Convert, and put the directory into place once it has been read back."""
    inputs = {"model": step.model} | ({"student": step.student} if step.student else {})
    for path in inputs.values():
        verify_manifest(path)
    with RunRecord(MODULE, step, inputs) as record:
        selected = selected_step(step.student, step.selection) if step.student else None
        checkpoint = step.student / f"checkpoint-{selected}" if step.student else None
        model = load_student(
            step.model, checkpoint, step.format, "merged", step.precision, trust_remote_code=step.trust_remote_code
        )
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        ids = torch.tensor([tokenizer(PROBE).input_ids], device=model.device)
        expected = logits(model, ids)
        with staged_directory(step.output) as staging:
            export_quantized(model, tokenizer, staging)
            del model
            found = logits(load_exported(staging, step.precision, step.trust_remote_code), ids)
            difference = relative_difference(found, expected, step.format)
            write_manifest(staging)
            record.add(
                format=step.format.name,
                selected_step=selected,
                largest_logit_difference=difference,
                bytes=sum(file.stat().st_size for file in staging.glob("*.safetensors")),
            )
            record.write(staging / "run.json")
        logger.info("%s: step %s, logits differ by at most %.2g of their size", step.format.name, selected, difference)


def selected_step(student: Path, selection: Selection) -> int:
    """The checkpoint to deploy: the lowest KL to the teacher on validation, the earliest of equals; or the last."""
    rows: list[dict[str, Any]] = [row for row in read_metrics(student / METRICS_FILE) if VALIDATION_KL in row]
    if not rows:
        raise UserError(f"{student / METRICS_FILE}: has no {VALIDATION_KL}: train again")
    chosen = min(rows, key=lambda row: row[VALIDATION_KL]) if selection == "validation_kl" else rows[-1]
    return int(chosen["step"])


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [1, tokens, vocabulary] in fp32 on the CPU."""
    output: Tensor = model(input_ids=ids).logits
    return output.float().cpu()


def relative_difference(found: Tensor, expected: Tensor, weight_format: WeightFormat) -> float:
    """The largest difference over the largest logit; a UserError where it is more than rounding can explain.

    compressed-tensors unpacks nvfp4 to bf16; all other formats come back as the very numbers.
    """
    difference = float((found - expected).abs().max() / expected.abs().max())
    tolerance = 2e-2 if weight_format.kind == "nvfp4" else 1e-3
    if difference > tolerance:
        raise UserError(
            f"format {weight_format.name}: logits of the exported model differ by {difference:.2g} of their size from "
            f"the student's (tolerance {tolerance:.2g}): the installed packing library is not the one that was tested"
        )
    return difference


if __name__ == "__main__":
    run_step(ExportStep, main)
