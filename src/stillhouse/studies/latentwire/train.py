"""Step program: train one channel for a pair of frozen readers, and keep its checkpoints.

The condition's settings decide what is trained; the loop is the shared one. Resumable state lies in
`work/<fingerprint>/`, and the output directory appears whole when the last step is done. Readers are in the pair's
order everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from stillhouse.config.base import StrictModel
from stillhouse.config.training import TrackingSettings
from stillhouse.models.output_head import require_plain_head
from stillhouse.models.precision import resolve_precision
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest, write_manifest
from stillhouse.runtime.logs import log_to_file, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.runtime.seeds import seed_everything
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.curves import DIAGNOSTICS_FILE, append_diagnostics
from stillhouse.studies.latentwire.data import WireData, WireExample, answer_tokens, read_examples
from stillhouse.studies.latentwire.diagnostics import Diagnostics
from stillhouse.studies.latentwire.objective import LatentWireObjective, Observer
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.studies.latentwire.text_teacher import CachedTeacher, OnlineTeacher, TextTeacher
from stillhouse.training.loop import train
from stillhouse.training.processes import process_state, staged_output

MODULE = "stillhouse.studies.latentwire.train"
PATHS = {"models", "data", "encoder", "caches", "output", "work"}


class TrainStep(StrictModel):
    """The step's command line. models, names, trust_remote_code and caches are in the pair's order."""

    models: tuple[Path, ...]
    data: Path
    encoder: Path | None = None
    caches: tuple[Path, ...] = ()
    output: Path
    work: Path
    names: tuple[str, ...]
    condition: str
    seed: int
    run: RunSettings
    max_text_bytes: int | None = None
    tracking: TrackingSettings
    trust_remote_code: tuple[bool, ...]


def main(step: TrainStep) -> None:
    """Train from the newest state of this very run, and put the checkpoints into place."""
    inputs = named_inputs(step)
    for path in inputs.values():
        verify_manifest(path)
    precision = resolve_precision(step.run.training.precision)
    work_dir = step.work / fingerprint(MODULE, step, inputs, exclude=PATHS, precision=precision)
    if process_state().is_main_process:
        log_to_file(work_dir)
    run, seed = step.run, step.seed + step.run.seed_offset
    with RunRecord(MODULE, step, inputs) as record:
        seed_everything(seed)
        split = read_examples(step.data / "train.jsonl", run.train_examples, step.max_text_bytes)
        readers = load_readers(step)
        texts = [example.text for example in split.examples]
        channel = Channel.build(run, readers, seed, step.encoder, texts)
        fit = channel.encoder.check(texts, "train")
        check_evaluation_texts(channel, step)
        check_first_steps(channel, split.examples)
        data = wire_data(channel, split.examples)
        facts = {"examples": len(data), "left_out": split.left_out, "encoder_fit": asdict(fit)}
        logger.info("%s: %d examples, %d left out as too long", step.condition, len(data), split.left_out)
        diagnostics = work_dir / DIAGNOSTICS_FILE
        observe = observer(diagnostics, texts) if process_state().is_main_process else None
        objective = LatentWireObjective(run, teachers(step, readers), observe)
        with staged_output(step.output) as staging:
            result = train(
                channel,
                objective,
                data,
                run.training,
                work_dir=work_dir,
                output_dir=staging,
                seed=seed,
                tracking=step.tracking,
                run_name=f"{step.condition}-seed-{step.seed}",
            )
            if process_state().is_main_process:
                (staging / DIAGNOSTICS_FILE).write_bytes(diagnostics.read_bytes() if diagnostics.exists() else b"")
                record.add(training=asdict(result), **facts)
                write_manifest(staging)
                record.write(staging / "run.json")


def named_inputs(step: TrainStep) -> dict[str, Path]:
    """What the run reads, by a name that does not depend on where it lies."""
    inputs = {"data": step.data, **{f"model/{name}": path for name, path in zip(step.names, step.models, strict=True)}}
    if step.encoder is not None:
        inputs["encoder"] = step.encoder
    return inputs | {f"cache/{name}": path for name, path in zip(step.names, step.caches, strict=False)}


def load_readers(step: TrainStep) -> dict[str, Reader]:
    """The frozen models by name."""
    given = zip(step.names, step.models, step.trust_remote_code, strict=True)
    return {name: Reader.load(name, path, step.run.reader, trust) for name, path, trust in given}


def check_evaluation_texts(channel: Channel, step: TrainStep) -> None:
    """Refuse now what would end the evaluation after hours of training: texts that the encoder cannot take."""
    for split in ("validation", "test"):
        examples = read_examples(step.data / f"{split}.jsonl", max_text_bytes=step.max_text_bytes).examples
        channel.encoder.check([example.text for example in examples], split)


def check_first_steps(channel: Channel, examples: Sequence[WireExample]) -> None:
    """Assert for each reader that training and generation meet at the answer's first token (t = 0)."""
    with torch.no_grad():
        latents = channel.eval().encode([example.text for example in examples[:2]])
    for name in channel.readers:
        reader = channel.reader(name)
        answers = answer_tokens([reader.answer_ids(example.answer) for example in examples[:2]]).to(reader.device)
        reader.check_first_step(reader.prompt_embeddings(channel.prefix(name, latents)), answers)


def wire_data(channel: Channel, examples: Sequence[WireExample]) -> WireData:
    """The examples with each reader's own tokens of the answers."""
    readers = [channel.reader(name) for name in channel.readers]
    vectors = channel.run.latent.per_model(len(readers))
    positions = sum(len(reader.bos_ids) + vectors + len(reader.anchor_ids) for reader in readers)
    return WireData(examples, {reader.name: reader.answer_ids for reader in readers}, positions)


def teachers(step: TrainStep, readers: dict[str, Reader]) -> dict[str, TextTeacher]:
    """What kd and state_kd compare each reader with; empty where no loss needs it."""
    if not step.run.losses.needs_teacher:
        return {}
    for reader in readers.values():
        require_plain_head(reader.model)
    if step.run.teacher.targets == "cached":
        if len(step.caches) != len(readers):
            raise UserError(
                f"caches: has {len(step.caches)} teacher caches for {len(readers)} models: name one for each"
            )
        named = zip(step.caches, readers.items(), strict=True)
        return {name: CachedTeacher(cache, reader) for cache, (name, reader) in named}
    return {name: OnlineTeacher(reader, step.run.teacher.batch_tokens) for name, reader in readers.items()}


def observer(path: Path, texts: Sequence[str]) -> Observer:
    """Adds a row of diagnostics to `path` each time it is called."""
    look = Diagnostics(texts)
    return lambda channel, step: append_diagnostics(path, look(channel, step))


if __name__ == "__main__":
    run_step(TrainStep, main)
