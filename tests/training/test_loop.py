"""The loop: what changes its results, what must not, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.lora import checkpoint_kind, load_checkpoint, load_trainable
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest
from stillhouse.training.data_order import examples_of_step, slice_of_process
from stillhouse.training.objective import LossTerms
from stillhouse.training.tracking import read_metrics
from tests.training.tiny_run import AnswerCrossEntropy, ProblemData, tiny_settings, tiny_train


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_weights(left: nn.Module, right: nn.Module, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(trained_weights(left), trained_weights(right), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return tiny_train(tiny_model, tmp_path_factory.mktemp("reference"), tiny_settings())[0]


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 10_000}, {"packing": False}, {"gradient_checkpointing": True}],
    ids=["one example at a time", "whole batch", "padded", "checkpointed"],
)
def test_micro_batches_and_packing_change_nothing(
    tiny_model: Path, tmp_path: Path, reference: nn.Module, changes: dict[str, Any]
) -> None:
    model, _ = tiny_train(tiny_model, tmp_path, tiny_settings(**changes))
    # Adam divides by the gradient's own size, which magnifies rounding.
    assert_equal_weights(model, reference, tolerance=2e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 250, 10_000])
def test_the_loss_is_the_mean_over_all_answer_tokens_of_the_update(
    tiny_model: Path, tmp_path: Path, micro_batch_tokens: int
) -> None:
    """With answers of uneven length a mean of micro-batch means would differ."""
    settings = tiny_settings(
        steps=1,
        schedule={"warmup_steps": 0},
        micro_batch_tokens=micro_batch_tokens,
        method="full",
        max_gradient_norm=1e9,
    )
    tiny_train(tiny_model, tmp_path, settings)
    [row] = read_metrics(tmp_path / "output" / "metrics.jsonl")

    model, data = load_model(tiny_model, "fp32", "cpu"), ProblemData(tiny_model)
    losses = []
    for index in examples_of_step(1, 5, len(data), seed=3):
        sequence = data.sequences[index]
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
        start = sequence.answer_start
        log_probabilities = logits[start - 1 : -1].log_softmax(-1)
        losses.append(-log_probabilities.gather(1, torch.tensor(sequence.answer_ids)[:, None]).flatten())
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert row["cross_entropy"] == row["loss"]
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert row["units"] == sum(len(values) for values in losses)


def test_training_lowers_the_loss_and_leaves_the_base_alone(tiny_model: Path, tmp_path: Path) -> None:
    model, result = tiny_train(tiny_model, tmp_path, tiny_settings(steps=12))
    rows = read_metrics(tmp_path / "output" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    before = load_model(tiny_model, "fp32", "cpu").state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert result.steps == 12 and result.tokens == sum(row["tokens"] for row in rows)


def test_the_outputs_are_checkpoints_metrics_and_curves(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = tiny_train(tiny_model, tmp_path, tiny_settings(steps=7))
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} == {"checkpoint-4", "checkpoint-7", "metrics.jsonl", "tensorboard"}
    assert list((output / "tensorboard").rglob("events.out.tfevents.*"))
    verify_manifest(output / "checkpoint-7")
    assert checkpoint_kind(output / "checkpoint-7") == "lora"
    targets = json.loads((output / "checkpoint-7" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    reloaded = load_checkpoint(load_model(tiny_model, "fp32", "cpu"), output / "checkpoint-7")
    tokens = torch.arange(10)[None]
    model.eval()
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits)


def test_full_fine_tuning_saves_a_whole_model_and_its_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = tiny_train(
        tiny_model, tmp_path, tiny_settings(steps=3, method="full"), tokenizer=load_tokenizer(tiny_model)
    )
    checkpoint = tmp_path / "output" / "checkpoint-3"
    assert checkpoint_kind(checkpoint) == "full"
    assert load_tokenizer(checkpoint).chat_template == load_tokenizer(tiny_model).chat_template
    reloaded = load_checkpoint(load_model(tiny_model, "fp32", "cpu"), checkpoint)
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_trains_master_weights_in_fp32(tiny_model: Path, tmp_path: Path, method: str) -> None:
    settings = tiny_settings(steps=3, method=method, precision="bf16")
    model, _ = tiny_train(tiny_model, tmp_path, settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if method == "lora" else set())
    if method == "full":
        saved = load_model(tmp_path / "output" / "checkpoint-3", "bf16", "cpu")
        assert saved.config.dtype == torch.bfloat16


def test_a_plain_module_trains_and_is_saved(tiny_model: Path, tmp_path: Path) -> None:
    """Studies whose student is no transformers model use the same loop."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = load_model(tiny_model, "fp32", "cpu").requires_grad_(False)
            self.bias = nn.Parameter(torch.zeros(1))

        def get_output_embeddings(self) -> nn.Module:
            return self.language_model.get_output_embeddings()

        def forward(self, **inputs: Any) -> Any:
            output = self.language_model(**inputs)
            output.logits = output.logits * (1 + self.bias)
            return output

    model, _ = tiny_train(tiny_model, tmp_path, tiny_settings(steps=3), model=Wrapped())
    assert model.bias.item() != 0
    assert (tmp_path / "output" / "checkpoint-3" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="gradient_checkpointing: Wrapped"):
        tiny_train(tiny_model, tmp_path / "2", tiny_settings(gradient_checkpointing=True), model=Wrapped())


def test_the_data_order_is_a_permutation_per_epoch_and_no_matter_of_processes() -> None:
    stream = [index for step in range(1, 9) for index in examples_of_step(step, 5, 20, seed=3)]
    assert sorted(stream[:20]) == sorted(stream[20:]) == list(range(20))
    assert stream[:20] != stream[20:]
    assert stream != [index for step in range(1, 9) for index in examples_of_step(step, 5, 20, seed=4)]
    shares = [slice_of_process(stream[:5], rank, 3) for rank in range(3)]
    assert [index for share in shares for index in share] == stream[:5]


class TooLarge(AnswerCrossEntropy):
    """Runs out of memory on more than `limit` tokens, as a GPU would."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __call__(self, model: nn.Module, micro_batch: Any, step: int) -> LossTerms:
        if micro_batch.tokens > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return super().__call__(model, micro_batch, step)


@pytest.mark.fault("out of memory in a step", "micro-batch halved, same effective batch, same weights")
def test_exhausted_memory_halves_the_micro_batch_and_changes_nothing(
    tiny_model: Path, tmp_path: Path, reference: nn.Module
) -> None:
    model, result = tiny_train(
        tiny_model, tmp_path, tiny_settings(micro_batch_tokens=2000), objective=TooLarge(limit=300)
    )
    assert result.micro_batch_tokens <= 300
    assert_equal_weights(model, reference, tolerance=2e-5)


@pytest.mark.fault("out of memory with a single example", "a line that names the step and three remedies")
def test_an_example_that_does_not_fit_in_memory_is_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 1: a single example does not fit in memory"):
        tiny_train(tiny_model, tmp_path, tiny_settings(), objective=TooLarge(limit=10))


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_model: Path, tmp_path: Path) -> None:
    class NotFinite(AnswerCrossEntropy):
        def __call__(self, model: nn.Module, micro_batch: Any, step: int) -> LossTerms:
            terms = super().__call__(model, micro_batch, step)
            return LossTerms(terms.total * (float("nan") if step == 3 else 1.0), terms.count)

    with pytest.raises(UserError, match="step 3: the gradient is not finite"):
        tiny_train(tiny_model, tmp_path, tiny_settings(), objective=NotFinite())
    assert (tmp_path / "work" / "state-2").is_dir()
    assert not (tmp_path / "output").exists()


def test_learning_rate_multipliers_reach_the_update(tiny_model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        method="full", steps=2, schedule={"warmup_steps": 1}, learning_rate_multipliers={"lm_head": 1e-9}
    )
    model, _ = tiny_train(tiny_model, tmp_path, settings)
    before = load_trainable(tiny_model, settings, seed=1, device="cpu")
    torch.testing.assert_close(model.lm_head.weight, before.lm_head.weight, atol=1e-7, rtol=0)
    assert not torch.allclose(model.model.norm.weight, before.model.norm.weight, atol=1e-4)
    row = read_metrics(tmp_path / "output" / "metrics.jsonl")[-1]
    assert row["learning_rate/lm_head"] == pytest.approx(1e-9 * row["learning_rate/base"])
