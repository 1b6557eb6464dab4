"""The overfit test: on a handful of examples, through real wire messages, the latent arm reaches the text arm's F1.

A channel that cannot carry what it has seen a hundred times cannot carry anything. Here the tiny readers first learn
to answer from the texts, so that their text arm is worth reaching. With the packaged models it takes minutes, and
runs where the workflow has left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from latentwire.tiny_readers import FAMILIES, make_families, tiny_reader
from torch.nn import functional

from stillhouse.evaluation.reading_comprehension import score_reading_answer
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import WireData, WireExample, answer_tokens, wire_text
from stillhouse.studies.latentwire.objective import LatentWireObjective
from stillhouse.studies.latentwire.prompt import Prompt
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import ReaderSettings, RunSettings
from stillhouse.studies.latentwire.wire import WireFormat, pack, unpack

PACKAGED = Path(__file__).parents[2] / "resources" / "models"
FACTS = (
    ("Who wrote the log?", "The log of the lighthouse was kept by Ada Brown until 1931.", "Ada Brown"),
    ("How high is the tower?", "The tower, built of grey granite, is 42 metres high.", "42 metres"),
    ("Where did the ship sail from?", "In May the ship sailed from Bergen with a cargo of timber.", "Bergen"),
    ("What did the miners find?", "After a year the miners found copper below the old mill.", "copper"),
)
EXAMPLES = [
    WireExample(str(index), "made up", wire_text(question, context), question, (answer,))
    for index, (question, context, answer) in enumerate(FACTS)
]
GENERATION = AnswerGenerationSettings(max_new_tokens=10)


def f1(reader: Reader, prompt: Prompt) -> float:
    """The mean F1 of a reader's answers."""
    answers = reader.generate(prompt, GENERATION)
    scores = [score_reading_answer(one, example.answers).f1 for one, example in zip(answers, EXAMPLES, strict=True)]
    return sum(scores) / len(scores)


def text_f1(reader: Reader) -> float:
    return f1(reader, reader.text_embeddings([reader.text_prompt(example.text) for example in EXAMPLES]))


def descend(parameters: Sequence[torch.nn.Parameter], loss, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(1, steps + 1):
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as the training loop does
        optimizer.step()
        optimizer.zero_grad()


def latent_f1(readers: dict[str, Reader], run: RunSettings, steps: int, rate: float) -> dict[str, float]:
    """Train a channel on the examples; send them as int8 messages; the F1 of what each reader answers."""
    channel = Channel.build(run, readers, seed=0).train()
    batch = WireData(EXAMPLES, {name: reader.answer_ids for name, reader in readers.items()}).batch(
        range(len(EXAMPLES))
    )
    objective = LatentWireObjective(run)
    trained = [parameter for parameter in channel.parameters() if parameter.requires_grad]
    descend(trained, lambda step: objective(channel, batch, step).total / len(EXAMPLES), steps, rate)
    with torch.no_grad():
        latents = channel.eval().encode([example.text for example in EXAMPLES])
        received = torch.stack([unpack(pack(one, WireFormat("int8"))) for one in latents.message()])
        return {
            name: f1(reader, reader.prompt_embeddings(channel.prefix(name, channel.latents(received))))
            for name, reader in readers.items()
        }


def teach(reader: Reader) -> None:
    """Let a random model learn to answer from the full texts."""
    prompts = [reader.text_prompt(example.text) for example in EXAMPLES]
    answers = answer_tokens([reader.answer_ids(example.answer) for example in EXAMPLES])

    def loss(step: int) -> torch.Tensor:
        rows = reader.answer_rows(reader.text_embeddings(prompts), answers)
        return functional.cross_entropy(rows.logits, rows.labels)

    reader.requires_grad_(True)
    descend(list(reader.parameters()), loss, steps=80, rate=3e-3)
    reader.requires_grad_(False)


@pytest.mark.parametrize("encoder", ["bytes", "language_model"])
def test_on_a_handful_of_examples_the_latent_arm_reaches_the_text_arm(tmp_path, encoder):
    torch.manual_seed(0)
    paths = make_families(tmp_path)
    readers = {family: tiny_reader(paths, family) for family in FAMILIES}
    for reader in readers.values():
        teach(reader)
        assert text_f1(reader) == 1.0
    run = RunSettings.model_validate(
        {
            "latent": {"length": 4, "dimension": 32},
            "encoder": {"kind": encoder, "layers": 1, "width": 32, "heads": 4, "lora": {"rank": 4}, "max_length": 512},
            "reader": {"precision": "fp32"},
        }
    )
    assert latent_f1(readers, run, steps=180, rate=4e-3) == {"llama": 1.0, "gemma": 1.0}


@pytest.mark.slow
def test_on_a_handful_of_examples_the_latent_arm_reaches_the_text_arm_of_the_packaged_models():
    names = ("smollm2_135m", "gemma3_270m")
    for name in names:
        if not (PACKAGED / name).is_dir():
            pytest.skip(f"resources/models/{name} is not there: `snakemake resources/models/{name}`")
    settings = ReaderSettings(precision="fp32")
    readers = {name: Reader.load(name, PACKAGED / name, settings) for name in names}
    run = RunSettings.model_validate(
        {
            "latent": {"length": 8, "dimension": 64},
            "encoder": {"layers": 2, "width": 64, "heads": 4},
            "reader": settings.model_dump(),
        }
    )
    latent = latent_f1(readers, run, steps=120, rate=4e-3)
    text = {name: text_f1(reader) for name, reader in readers.items()}
    assert min(latent.values()) >= 0.5, (latent, text)
    assert all(latent[name] >= text[name] for name in names), (latent, text)
