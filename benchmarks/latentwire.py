"""LatentWire's distilled step with the text teacher's states from a cache, and with the teacher in the step.

Made-up questions about passages of `context` words; examples, channel and loss are the same. No tool trains such a
channel, so the naive form is the only other one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, loss_and_gradients, model_directory, words
from stillhouse.data.records import ReadingQuestion, write_records
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.files import staged_directory, write_manifest
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.data import WireBatch, WireData, read_examples
from stillhouse.studies.latentwire.objective import LatentWireObjective
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.studies.latentwire.text_teacher import CachedTeacher, OnlineTeacher, TextTeacher, TextTeacherStep
from stillhouse.studies.latentwire.text_teacher import main as build_cache


def settings(scale: Scale) -> RunSettings:
    """The encoder of the default run, small, so that the reader's part is what is measured."""
    run = {
        "losses": {"kd": 1.0},
        "encoder": {"layers": 2, "width": 64, "heads": 4},
        "latent": {"length": scale.latents, "dimension": 64},
        "reader": {"precision": scale.precision},
    }
    return RunSettings.model_validate(run)


def data_directory(folder: Path, scale: Scale) -> Path:
    """The questions as a training split."""
    directory = folder / f"questions-{scale.context}-{scale.batch}"
    if not directory.exists():
        records = [
            ReadingQuestion(
                str(number), "made up", words(scale.context, number), "What did Ada buy?", (words(2, number + 1),)
            )
            for number in range(scale.batch)
        ]
        with staged_directory(directory) as staging:
            write_records(staging / "train.jsonl", records)
            write_manifest(staging)
    return directory


def wire(folder: Path, scale: Scale) -> tuple[Reader, Channel, WireBatch]:
    """A reader, a new channel to it, and one batch."""
    run = settings(scale)
    reader = Reader.load("reader", model_directory(folder, scale), run.reader)
    channel = Channel.build(run, {"reader": reader}, seed=0).train()
    examples = read_examples(data_directory(folder, scale) / "train.jsonl").examples
    batch = WireData(examples, {"reader": reader.answer_ids}).batch(range(len(examples)))
    return reader, channel, batch.to(reader.device)


def step(make_teacher: Callable[[Path, Scale, Reader], TextTeacher], folder: Path, scale: Scale) -> Work:
    """Forward and backward pass of the study's objective with that teacher."""
    reader, channel, batch = wire(folder, scale)
    objective = LatentWireObjective(settings(scale), {"reader": make_teacher(folder, scale, reader)})

    def work() -> Outcome:
        terms = objective(channel, batch, 1)
        return loss_and_gradients(channel, terms.total / terms.count)

    return work


def teacher_in_the_step(folder: Path, scale: Scale, reader: Reader) -> TextTeacher:
    """The reader reads the full text in each step."""
    return OnlineTeacher(reader, settings(scale).teacher.batch_tokens)


def cached_teacher(folder: Path, scale: Scale, reader: Reader) -> TextTeacher:
    """The cache as its step program makes it."""
    cache, run = folder / f"text-teacher-{short_digest(repr(scale))}", settings(scale)
    assert run.cache is not None
    if not cache.exists():
        build_cache(
            TextTeacherStep(
                model=model_directory(folder, scale),
                data=data_directory(folder, scale),
                output=cache,
                work=folder / "text-teacher-work",
                name="reader",
                cache=run.cache,
            )
        )
    return CachedTeacher(cache, reader)


def floor(folder: Path, scale: Scale) -> Floor:
    """Latents and answers through the reader, forward and backward; the encoder is left out."""
    reader, _, batch = wire(folder, scale)
    answers = batch.targets["reader"].tokens
    prompt = scale.latents + len(reader.text_prompt("")) - len(reader.text_ids(""))
    length = prompt + answers / scale.batch
    tokens = int(scale.batch * length)
    needed = scale.operations(tokens, scale.batch * length * (length + 1) / 2, answers)
    return Floor(2 * needed, 2 * scale.weight_bytes, tokens)


CACHED_STEP = Benchmark(
    name="latentwire_step",
    what="LatentWire step with cached text teacher",
    forms=(
        Form("teacher in the step", "naive", partial(step, teacher_in_the_step)),
        Form("cached teacher", "ours", partial(step, cached_teacher)),
    ),
    aims=(Aim("teacher in the step", "time", 1.5),),
    floor=floor,
    floor_formula="2 x forward(latents, anchor and answer of the batch); the weights are read once in each direction",
    remains="The encoder over bytes, which the floor leaves out, and the output embeddings on every answer token of "
    "teacher and channel.",
)
