"""The readers of a pair and one channel at a time, loaded when they are first needed, and rows of scores from them.

Stands between the arms and `evaluate`, which decides what is computed. Everything here is in terms of subjects.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from stillhouse.evaluation.reading_comprehension import SquadVersion
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json
from stillhouse.runtime.logs import logger
from stillhouse.studies.latentwire.adapters import Adapter
from stillhouse.studies.latentwire.arms import present_latents, present_replay, present_texts, text_prompt
from stillhouse.studies.latentwire.channel import WEIGHTS, Channel
from stillhouse.studies.latentwire.combine import Outputs, graded
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import WireExample
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.results import Subject
from stillhouse.studies.latentwire.run_settings import ReaderSettings, RunSettings
from stillhouse.studies.latentwire.scoring import (
    ItemScore,
    Presentation,
    ScoringSettings,
    batches,
    candidate_nll,
    score_items,
)
from stillhouse.studies.latentwire.wire import WireFormat, pack


@dataclass(frozen=True)
class ChannelRun:
    """One trained channel: what it was trained with, and its checkpoints by step."""

    directory: Path
    condition: str
    seed: int
    run: RunSettings
    encoder: Path | None
    checkpoints: Mapping[int, Path]

    @classmethod
    def read(cls, directory: Path, encoders: Sequence[Path] = ()) -> ChannelRun:
        """The run that `directory` holds. encoders: model directories, named as the catalogue names them."""
        settings = read_json(directory / "run.json")["settings"]
        run = RunSettings.model_validate(settings["run"])
        encoder = next((path for path in encoders if path.name == run.encoder.model), None)
        if run.encoder.kind == "sentence" and encoder is None:
            raise UserError(f"{directory}: needs the sentence encoder '{run.encoder.model}': name it in encoders")
        checkpoints = {int(path.name.partition("-")[2]): path for path in directory.glob("checkpoint-*")}
        return cls(directory, settings["condition"], settings["seed"], run, encoder, dict(sorted(checkpoints.items())))

    @property
    def key(self) -> tuple[str, int]:
        """Condition and seed."""
        return self.condition, self.seed

    @property
    def trained_parameters(self) -> int:
        """How many numbers a checkpoint holds."""
        checkpoint = next(iter(self.checkpoints.values()))
        with safe_open(checkpoint / WEIGHTS, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


class Laboratory:
    """Readers by name, each loaded once and adapted to whatever is scored."""

    def __init__(
        self, models: Mapping[str, tuple[Path, bool]], neutral: ReaderSettings, batch_size: int, version: SquadVersion
    ) -> None:
        """models: directory and trust_remote_code by name. neutral: reader settings of the text arms."""
        self.models, self.batch_size, self.version = models, batch_size, version
        # Nothing that a channel trains inside a reader takes part in a text arm.
        self.neutral = neutral.model_copy(update={"lora": None, "prefix_tuning": 0, "deep_prefix": False})
        self.loaded: tuple[Path, int] | None = None
        self._channel: Channel | None = None
        self._known: dict[tuple[str, str, tuple[int, ...]], ItemScore] = {}

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """The frozen models."""
        return {name: Reader.load(name, path, self.neutral, trust) for name, (path, trust) in self.models.items()}

    def channel(self, run: ChannelRun, step: int) -> Channel:
        """A checkpoint, which the readers then serve."""
        if self.loaded != (run.directory, step) or self._channel is None:
            logger.info("loading %s, seed %d, step %d", run.condition, run.seed, step)
            self._channel = Channel.load(run.checkpoints[step], run.run, self.readers, run.encoder)
            self.loaded = (run.directory, step)
        return self._channel

    def text_readers(self) -> dict[str, Reader]:
        """The readers as the text arms use them."""
        if self.loaded is not None:
            self.loaded = self._channel = None
            for reader in self.readers.values():
                reader.adapt(self.neutral, seed=0)
        return self.readers

    @torch.no_grad()
    def messages(self, run: ChannelRun, step: int, wire: WireFormat, examples: Sequence[WireExample]) -> pd.DataFrame:
        """What goes over the wire for each example, in their order.

        Columns: message; seconds, each one's share of encoding and packing its batch; cut, how many of all texts the
        encoder had to cut. Raises `UserError` where these are more than the channel's settings allow.
        """
        channel, texts = self.channel(run, step), [example.text for example in examples]
        cut, rows = channel.encoder.check(texts, "evaluated").cut, []
        for batch in batches(range(len(texts)), self.batch_size):
            began = time.monotonic()
            sent = [pack(one, wire) for one in channel.encode([texts[index] for index in batch]).message()]
            seconds = (time.monotonic() - began) / len(batch)
            rows += [(message, seconds, cut) for message in sent]
        return pd.DataFrame(rows, columns=["message", "seconds", "cut"])

    def latent_rows(
        self,
        subject: Subject,
        run: ChannelRun,
        sent: pd.DataFrame,
        examples: Sequence[WireExample],
        generation: AnswerGenerationSettings | None,
    ) -> pd.DataFrame:
        """The rows of one reader that reads wire messages (`sent` as `messages` gives them)."""
        channel = self.channel(run, subject.step)
        reader = self.readers[subject.reader]
        presentation = present_latents(reader, channel, list(sent["message"]), list(sent["seconds"]))
        return self._rows(reader, examples, presentation, generation)

    def text_rows(
        self, subject: Subject, examples: Sequence[WireExample], generation: AnswerGenerationSettings | None
    ) -> pd.DataFrame:
        """The rows of one reader that reads text; equal prompts are computed once."""
        reader = self.text_readers()[subject.reader]
        presentation, keys = self._texts(subject, reader, examples)
        missing = {index for index, key in enumerate(keys) if key not in self._known}
        settings = ScoringSettings(self.batch_size, generation)
        scores = score_items(reader, examples, presentation, settings, missing)
        self._known |= {keys[index]: score for index, score in scores.items()}
        return self._frame(reader, examples, presentation, [self._known[key] for key in keys])

    def replay_rows(
        self,
        subject: Subject,
        run: ChannelRun | None,
        examples: Sequence[WireExample],
        generation: AnswerGenerationSettings | None,
    ) -> pd.DataFrame:
        """The rows of one reader that reads the texts' own embeddings; `run` is for replay_adapter."""
        calibrate = None
        if run is None:
            self.text_readers()
        else:
            adapter = self.channel(run, subject.step).adapters[subject.reader]
            assert isinstance(adapter, Adapter)
            calibrate = adapter.calibrate
        reader = self.readers[subject.reader]
        return self._rows(reader, examples, present_replay(subject.arm, reader, examples, calibrate), generation)

    def joint_rows(
        self,
        subject: Subject,
        outputs: Outputs,
        run: ChannelRun | None,
        sent: pd.DataFrame | None,
        examples: Sequence[WireExample],
    ) -> pd.DataFrame:
        """Of all readers' answers, by reader, the one that the readers together find most likely per token.

        sent: the messages that they read; None where they read the full text.
        """
        totals: dict[str, list[float]] = {name: [0.0] * len(examples) for name in outputs}
        channel = self.channel(run, subject.step) if run else None
        readers = self.readers if channel else self.text_readers()
        for reader in readers.values():
            if channel and sent is not None:
                presentation = present_latents(reader, channel, list(sent["message"]))
            else:
                presentation, _ = self._texts(subject, reader, examples)
            for name, candidates in outputs.items():
                nll = candidate_nll(reader, presentation, candidates, self.batch_size)
                totals[name] = [total + value for total, value in zip(totals[name], nll, strict=True)]
        best = [min(outputs, key=lambda name: totals[name][index]) for index in range(len(examples))]
        chosen = [outputs[name][index] for index, name in enumerate(best)]
        return graded(examples, chosen, self.version)

    def _texts(
        self, subject: Subject, reader: Reader, examples: Sequence[WireExample]
    ) -> tuple[Presentation, list[tuple[str, str, tuple[int, ...]]]]:
        prompts, seconds = [], []
        for example in examples:
            began = time.monotonic()
            prompts.append(text_prompt(subject.arm, reader, example, subject.budget))
            seconds.append(time.monotonic() - began)
        keys = [(reader.name, example.id, prompt.ids) for example, prompt in zip(examples, prompts, strict=True)]
        return replace(present_texts(reader, prompts), prepared=seconds), keys

    def _rows(
        self,
        reader: Reader,
        examples: Sequence[WireExample],
        presentation: Presentation,
        generation: AnswerGenerationSettings | None,
    ) -> pd.DataFrame:
        scores = score_items(reader, examples, presentation, ScoringSettings(self.batch_size, generation))
        return self._frame(reader, examples, presentation, [scores[index] for index in range(len(examples))])

    def _frame(
        self,
        reader: Reader,
        examples: Sequence[WireExample],
        presentation: Presentation,
        scores: Sequence[ItemScore],
    ) -> pd.DataFrame:
        rows = pd.DataFrame([vars(score) for score in scores]).assign(
            seconds=np.array([score.seconds for score in scores]) + presentation.prepared,
            item_id=[example.id for example in examples],
            bytes=presentation.bytes,
            prompt_tokens=presentation.content,
            text_tokens=[len(reader.text_ids(example.text)) for example in examples],
        )
        written = [score.output for score in scores if score.output is not None]
        rows = rows.drop(columns="output")
        return rows.merge(graded(examples, written, self.version), on="item_id") if written else rows
