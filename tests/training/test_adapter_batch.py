"""Adapters that train together come out as each would alone, and as peft would train it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from stillhouse.config.training import LoraSettings, ScheduleSettings, TrainingSettings
from stillhouse.data.packing import AnswerBatch, micro_batches, pad
from stillhouse.data.packing import Sequence as TokenSequence
from stillhouse.models.loading import load_model
from stillhouse.models.lora import add_lora
from stillhouse.models.lora_tensors import AdapterTensors, model_layout, read_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.training.adapter_batch import (
    AdapterBatch,
    AdapterLosses,
    AdapterSequences,
    checkpoint_adapter,
    initial_a,
)
from stillhouse.training.loop import train
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import AnswerCrossEntropy

LORA = LoraSettings(rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"))
# The clip is far below the gradients' norm: adapters that shared it would slow each other down.
SETTINGS = TrainingSettings(
    lora=LORA,
    steps=4,
    batch_size=3,
    micro_batch_tokens=4096,
    learning_rate=0.01,
    max_gradient_norm=0.05,
    schedule=ScheduleSettings(kind="linear", warmup_steps=1),
    precision="fp32",
    packing=False,
    save_every=2,
    resume_every=2,
)
STARTS = (11, 11, 12)


def shard(number: int) -> list[TokenSequence]:
    """Five sequences of unequal lengths with answers of unequal lengths."""
    random = torch.Generator().manual_seed(number)
    sequences = []
    for index in range(5):
        length = 6 + (3 * index + 5 * number) % 7
        ids = torch.randint(3, 300, (length,), generator=random).tolist()
        sequences.append(TokenSequence(ids, length - 1 - (index + number) % 4, f"{number}-{index}"))
    return sequences


def trained(model: Path, directory: Path, shards: Sequence[int], budget: int = 4096) -> list[AdapterTensors]:
    """The adapters of some shards after a training together."""
    batch = AdapterBatch(load_model(model, "fp32"), LORA, [STARTS[number] for number in shards])
    train(
        batch,
        AdapterLosses([f"shard_{number}" for number in shards]),
        AdapterSequences([shard(number) for number in shards]),
        SETTINGS.model_copy(update={"micro_batch_tokens": budget}),
        work_dir=directory / "work",
        output_dir=directory / "out",
        seed=5,
        groups=batch.groups(),
        clip_apart=True,
    )
    return [checkpoint_adapter(directory / "out/checkpoint-4", batch.layout, place) for place in range(len(shards))]


def assert_equal(one: AdapterTensors, other: AdapterTensors) -> None:
    for module in one.layout.modules:
        torch.testing.assert_close(one.a[module.name], other.a[module.name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.b[module.name], other.b[module.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [4096, 100])
def test_adapters_that_train_together_equal_those_that_train_alone(
    tiny_model: Path, tmp_path: Path, budget: int
) -> None:
    together = trained(tiny_model, tmp_path / "together", (0, 1, 2), budget)
    for number, adapter in enumerate(together):
        [alone] = trained(tiny_model, tmp_path / f"alone-{number}", (number,))
        assert_equal(adapter, alone)
        assert max(float(tensor.abs().max()) for tensor in adapter.b.values()) > 1e-3
    first, second = together[0], together[1]
    assert any(not torch.allclose(first.b[module.name], second.b[module.name]) for module in first.layout.modules)


class PlainExamples:
    """One shard for the shared loop."""

    def __init__(self, sequences: list[TokenSequence]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def micro_batches(self, indices: Sequence[int], token_budget: int) -> Iterator[AnswerBatch]:
        for group in micro_batches((self.sequences[index] for index in indices), token_budget, padded=True):
            yield pad(group)


def test_an_adapter_of_a_batch_equals_the_one_that_peft_trains(tiny_model: Path, tmp_path: Path) -> None:
    base = load_model(tiny_model, "fp32")
    layout = model_layout(base, LORA.target_modules, LORA.rank, LORA.alpha)
    peft_model = add_lora(base, LORA, seed=0)
    with torch.no_grad():
        for module, a in zip(layout.modules, initial_a(layout, STARTS[1]), strict=True):
            peft_model.get_submodule(f"base_model.model.{module.name}").lora_A["default"].weight.copy_(a)
    train(
        peft_model,
        AnswerCrossEntropy(),
        PlainExamples(shard(1)),
        SETTINGS,
        work_dir=tmp_path / "peft/work",
        output_dir=tmp_path / "peft/out",
        seed=5,
    )
    together = trained(tiny_model, tmp_path / "together", (0, 1))
    assert_equal(together[1], read_adapter(tmp_path / "peft/out/checkpoint-4"))


def test_the_log_has_the_loss_of_each_adapter(tiny_model: Path, tmp_path: Path) -> None:
    trained(tiny_model, tmp_path, (0, 2), budget=60)
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/shard_0"] + row["loss/shard_2"])
        assert row["units"] == 1


def test_the_base_keeps_its_weights_and_its_mode(tiny_model: Path) -> None:
    base = load_model(tiny_model, "fp32")
    batch = AdapterBatch(base, LORA, STARTS)
    batch.train()
    assert batch.training and not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert len(batch.groups()) == 3
    assert batch.adapters().count == 3


def test_a_target_that_the_model_lacks_is_refused(tiny_model: Path) -> None:
    settings = LORA.model_copy(update={"target_modules": ("q_proj", "w_proj")})
    with pytest.raises(UserError, match="no linear module 'w_proj'"):
        AdapterBatch(load_model(tiny_model, "fp32"), settings, (1,))
