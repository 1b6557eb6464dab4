"""What a text-teacher cache saves: LatentWire's distilled step with cached targets, and with the teacher in the step.

    python benchmarks/latentwire.py resources/models/smollm2_135m [--words 120] [--examples 4] [--steps 3]

Made-up questions about passages of `words` words; the same examples, channel and loss for both. Prints seconds per
step, the two losses (which must agree) and the seconds that the cache took to build.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stillhouse.data.records import ReadingQuestion, write_records
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.data import WireBatch, WireData, read_examples
from stillhouse.studies.latentwire.objective import LatentWireObjective
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.studies.latentwire.text_teacher import (
    CachedTeacher,
    OnlineTeacher,
    TextTeacher,
    TextTeacherStep,
)
from stillhouse.studies.latentwire.text_teacher import (
    main as build_cache,
)

WORDS = (
    "river",
    "mill",
    "keeper",
    "letter",
    "copper",
    "tower",
    "harvest",
    "bridge",
    "market",
    "stone",
    "ferry",
    "lamp",
)


def main() -> None:
    """Time both steps on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    # The encoder of the two-core default, so that the readers' part is what is measured.
    small = {"layers": 2, "width": 64, "heads": 4}
    run = RunSettings.model_validate(
        {"losses": {"kd": 1.0}, "encoder": small, "latent": {"length": 8, "dimension": 64}}
    )
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data", options.examples, options.words)
        reader = Reader.load("reader", options.model, run.reader)
        assert run.cache is not None
        cache = Path(folder) / "cache"
        step = TextTeacherStep(
            model=options.model, data=data, output=cache, work=Path(folder) / "work", name="reader", cache=run.cache
        )
        built = seconds(lambda: build_cache(step))
        channel = Channel.build(run, {"reader": reader}, seed=0).train()
        examples = read_examples(data / "train.jsonl").examples
        batch = WireData(examples, {"reader": reader.answer_ids}).batch(range(len(examples)))
        teachers: dict[str, TextTeacher] = {
            "cached": CachedTeacher(cache, reader),
            "in the step": OnlineTeacher(reader, run.teacher.batch_tokens),
        }
        prompt = len(reader.text_prompt(examples[0].text))
        print(f"{options.examples} examples, about {prompt} tokens of text each; cache built in {built:.1f} s")
        times = {name: timed(channel, run, teacher, batch, options.steps) for name, teacher in teachers.items()}
    print(f"the teacher in the step takes {times['in the step'] / times['cached']:.1f} times as long")


def timed(channel: Channel, run: RunSettings, teacher: TextTeacher, batch: WireBatch, steps: int) -> float:
    """Seconds per step, the first one left out."""
    objective = LatentWireObjective(run, {"reader": teacher})
    losses: list[float] = []

    def step() -> None:
        terms = objective(channel, batch, step=1)
        terms.total.backward()
        losses.append(terms.total.item() / terms.count)

    torch.manual_seed(0)
    step()
    each = seconds(lambda: [step() for _ in range(steps)]) / steps
    print(f"{teacher.__class__.__name__:>14}: {each:6.2f} s per step, loss {losses[0]:.5f}")
    return each


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def make_data(directory: Path, examples: int, words: int) -> Path:
    """Made-up questions as a training split."""
    directory.mkdir()
    chance = random.Random(0)
    records = []
    for number in range(examples):
        context = " ".join(chance.choices(WORDS, k=words))
        answer = " ".join(chance.choices(WORDS, k=2))
        records.append(ReadingQuestion(str(number), "made up", context, "What did the keeper see?", (answer,)))
    write_records(directory / "train.jsonl", records)
    write_manifest(directory)
    return directory


if __name__ == "__main__":
    main()
