"""What training adapters together saves: A LoRA trainings in one process over one base, and one after the other.

    python benchmarks/batched_teachers.py resources/models/smollm2_135m [--adapters 4] [--batch 2] [--steps 3]

Random answers of 16 tokens after prompts of 16, through the shared loop, fp32. The adapters must come out equal; then
prints seconds, learnt tokens per second and the ratio. Small batches gain most: they leave a device idle.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from stillhouse.config.training import LoraSettings, ScheduleSettings, TrainingSettings
from stillhouse.data.packing import Sequence
from stillhouse.models.loading import load_model
from stillhouse.models.lora_tensors import AdapterTensors, relative_error
from stillhouse.training.adapter_batch import AdapterBatch, AdapterExamples, AdapterLosses
from stillhouse.training.loop import train

PROMPT, ANSWER, EXAMPLES = 16, 16, 8


def main() -> None:
    """Compare and time both forms on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    model = load_model(options.model, "fp32")
    settings = TrainingSettings(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=1e-3,
        lora=LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj")),
        packing=False,
        precision="fp32",
        schedule=ScheduleSettings(warmup_steps=0),
        save_every=options.steps,
        resume_every=options.steps,
    )
    examples = [made_up_examples(number, model.config.vocab_size) for number in range(options.adapters)]
    together, seconds_together = trained(model, settings, examples)
    alone, seconds_alone = [], 0.0
    for own in examples:
        [adapter], seconds = trained(model, settings, [own])
        alone.append(adapter)
        seconds_alone += seconds
    error = max(float(relative_error(one, other)) for one, other in zip(together, alone, strict=True))
    if error > 1e-3:
        raise SystemExit(f"the adapters differ: relative error {error:.1e}")
    learnt = options.adapters * options.steps * options.batch * ANSWER
    print(
        f"{options.adapters} adapters, {options.steps} updates of {options.batch}: largest relative error {error:.1e}"
    )
    print(f"together   {seconds_together:.2f} s, {learnt / seconds_together:.1f} learnt tokens/s")
    print(f"one by one {seconds_alone:.2f} s, {learnt / seconds_alone:.1f} learnt tokens/s")
    print(f"{seconds_alone / seconds_together:.2f} times faster together")


def made_up_examples(number: int, vocabulary: int) -> list[Sequence]:
    """The examples of one adapter."""
    draw = random.Random(number)
    ids = [[draw.randrange(vocabulary) for _ in range(PROMPT + ANSWER)] for _ in range(EXAMPLES)]
    return [Sequence(row, PROMPT, f"{number}-{place}") for place, row in enumerate(ids)]


def trained(
    model: PreTrainedModel, settings: TrainingSettings, examples: list[list[Sequence]]
) -> tuple[list[AdapterTensors], float]:
    """One adapter for each list of examples, and the seconds of their updates."""
    batch = AdapterBatch(model, settings.lora, [0] * len(examples))
    objective = AdapterLosses([str(number) for number in range(len(examples))])
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            batch,
            objective,
            AdapterExamples(examples),
            settings,
            work_dir=Path(folder) / "work",
            output_dir=Path(folder) / "output",
            seed=0,
            groups=batch.groups(),
            clip_apart=True,
        )
    adapters = batch.adapters()
    return [
        adapters[number].map(lambda tensor: tensor.detach().cpu()) for number in range(len(examples))
    ], result.seconds


if __name__ == "__main__":
    main()
