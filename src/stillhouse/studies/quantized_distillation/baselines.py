"""Step program: round a model with GPTQ or AWQ, through llmcompressor, calibrated on the study's train split.

It runs in the environment that `assets.environment` makes from envs/llmcompressor.txt. What it leaves looks like what
`export` leaves: a transformers directory of compressed weights, with the same facts in `run.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import Precision
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.quantization import require_format
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.evaluation_settings import (
    AnswerRendering,
    BaselineSettings,
    CalibratedMethod,
)

MODULE = "stillhouse.studies.quantized_distillation.baselines"


class CalibrateStep(StrictModel):
    """The step's command line. environment: the one that runs it, named for the workflow's sake."""

    model: Path
    data: Path
    environment: Path
    output: Path
    method: CalibratedMethod
    format: WeightFormat
    baselines: BaselineSettings
    rendering: AnswerRendering
    precision: Precision = "auto"
    trust_remote_code: bool = False


def main(step: CalibrateStep) -> None:
    """Calibrate, round, and save the compressed model."""
    inputs = {"model": step.model, "data": step.data}
    for path in inputs.values():
        verify_manifest(path)
    with RunRecord(MODULE, step, inputs) as record, staged_directory(step.output) as staging:
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        renderer = prompt_renderer(tokenizer, step.rendering.prompt_format)
        rendering = step.rendering
        examples = read_instructions(
            step.data / "train.jsonl", renderer, rendering.max_length, rendering.response_room
        ).sequences
        rows = calibration_rows(examples, step.baselines)
        model = load_model(step.model, step.precision, trust_remote_code=step.trust_remote_code)
        require_format(model, step.format)
        logger.info("%s: calibrating on %d x %d tokens", step.method, len(rows), len(rows[0]))
        compress(model, rows, step.method, step.format)
        model.save_pretrained(staging, save_compressed=True)
        tokenizer.save_pretrained(staging)
        write_manifest(staging)
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        record.add(bytes=size, calibration_tokens=len(rows) * len(rows[0]))
        record.write(staging / "run.json")


def calibration_rows(examples: Iterable[Sequence], settings: BaselineSettings) -> list[list[int]]:
    """The examples' tokens one after another, cut into `samples` rows of `tokens`.

    Raises `UserError` where the split does not fill them.
    """
    stream = list(chain.from_iterable(example.input_ids for example in examples))
    filled = len(stream) // settings.tokens
    if filled < settings.samples:
        raise UserError(
            f"baselines.samples: the train split fills {filled} calibration sequences of {settings.tokens} tokens, not "
            f"{settings.samples}: lower baselines.samples or baselines.tokens, or take more data"
        )
    return [stream[start * settings.tokens : (start + 1) * settings.tokens] for start in range(settings.samples)]


def compress(
    model: PreTrainedModel, rows: list[list[int]], method: CalibratedMethod, weight_format: WeightFormat
) -> None:
    """Round the linear weights of the model's blocks in place, calibrated on `rows` of token ids."""
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
    except ImportError as error:
        raise UserError(
            f"condition {method}: llmcompressor cannot be imported ({error}): run this in the environment that "
            "envs/llmcompressor.txt describes"
        ) from None
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=weight_format.symmetric,
        strategy="group",
        group_size=weight_format.group,
    )
    scheme: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    recipe = [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )


if __name__ == "__main__":
    run_step(CalibrateStep, main)
