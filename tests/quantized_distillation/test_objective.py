"""The GKD objective: TRL's own step on the same batch, whose answers a step learns from, cached and online targets."""

from __future__ import annotations

import copy
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tiny_models import tiny_llama_config
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import LoraSettings
from stillhouse.data.packing import NO_LABEL, Sequence, answer_rows_logits, pad
from stillhouse.models.lora import add_lora
from stillhouse.models.output_head import output_head
from stillhouse.models.quantized_lora import fake_quantized
from stillhouse.models.target_cache import CacheFacts, compute_shards, publish_cache
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.records import RunRecord
from stillhouse.studies.quantized_distillation.batches import StudentData
from stillhouse.studies.quantized_distillation.divergence import generalized_jsd
from stillhouse.studies.quantized_distillation.objective import CachedTeacher, GkdObjective
from stillhouse.studies.quantized_distillation.run_settings import CacheSettings, DistillationSettings, SamplingSettings
from stillhouse.studies.quantized_distillation.teacher import MODULE, TeacherStep, targets

SAMPLING = SamplingSettings(min_new_tokens=2, max_new_tokens=6)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config()).eval()


def student() -> PeftModel:
    model = add_lora(tiny_llama(), LoraSettings(rank=4, alpha=8, dropout=0.0), seed=0)
    drawing = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=drawing) * 0.05
    return fake_quantized(model, WeightFormat(group_size=16)).train()


def sequences() -> list[Sequence]:
    drawing = torch.Generator().manual_seed(3)
    return [
        Sequence(torch.randint(10, 384, (prompt + answer,), generator=drawing).tolist(), prompt, f"example-{index}")
        for index, (prompt, answer) in enumerate([(4, 5), (9, 3), (2, 8)])
    ]


def objective(teacher: CachedTeacher | None = None, seed: int = 0, **settings: object) -> GkdObjective:
    return GkdObjective(DistillationSettings(**settings), SAMPLING, seed, (7,), teacher)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_and_gradients_equal_the_step_of_trl(beta: float, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl.experimental.gkd.gkd_trainer as trl

    batch = pad(sequences())
    labels = torch.full_like(batch.input_ids, NO_LABEL)
    for row, sequence in enumerate(sequences()):
        labels[row, -len(sequence.answer_ids) :] = torch.tensor(sequence.answer_ids)
    theirs = student()
    trainer = trl.GKDTrainer.__new__(trl.GKDTrainer)
    trainer.beta, trainer.teacher_model = beta, tiny_llama()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}

    class WithPositions(torch.nn.Module):  # left-padded positions, which TRL leaves to the model's defaults
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.model(**inputs, position_ids=batch.position_ids)

    trainer.teacher_model = WithPositions(trainer.teacher_model)
    loss = trainer.compute_loss(WithPositions(theirs), inputs)
    loss.backward()

    ours = student()
    [micro_batch] = StudentData(sequences(), packing=packing).micro_batches(range(3), 1000)
    terms = objective(beta=beta)(ours, micro_batch, step=1)
    (terms.total / terms.count).backward()
    torch.testing.assert_close(terms.total / terms.count, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-3, atol=1e-6)
    assert terms.count == 16


def test_the_loss_is_taken_at_its_own_temperature() -> None:
    model = student()
    [micro_batch] = StudentData(sequences()).micro_batches(range(3), 1000)
    with torch.no_grad():
        learning, teaching = answer_rows_logits(model, micro_batch), answer_rows_logits(tiny_llama(), micro_batch)
        losses = {
            temperature: objective(beta=0.5, temperature=temperature)(model, micro_batch, step=1).total
            for temperature in (1.0, 2.0)
        }
    for temperature, loss in losses.items():
        torch.testing.assert_close(loss, generalized_jsd(learning, teaching, 0.5, temperature).sum())
    assert losses[2.0] < 0.9 * losses[1.0], "flatter distributions are nearer to each other"


def test_lambda_is_the_share_of_steps_that_learn_from_samples() -> None:
    steps = range(1, 2001)
    for share in (0.0, 0.3, 1.0):
        sources = [objective(on_policy_share=share).source(step) for step in steps]
        assert abs(sources.count("student") / len(sources) - share) < 0.03
        assert set(sources) <= {"student", "data"}
    both = [objective(on_policy_share=0.3, seq_kd=True).source(step) for step in steps]
    assert set(both) == {"student", "teacher"}
    assert both != [objective(on_policy_share=0.3, seq_kd=True, seed=1).source(step) for step in steps]


@pytest.mark.parametrize("settings", [{"on_policy_share": 1.0}, {"seq_kd": True}])
def test_sampled_answers_are_learnt_as_if_they_were_data(settings: dict[str, object]) -> None:
    model = student()
    [micro_batch] = StudentData(sequences(), sampled_tokens=6).micro_batches(range(3), 1000)
    sampling = objective(**settings)
    terms = sampling(model, micro_batch, step=3)
    terms.total.backward()
    batch = sampling.answered(model, micro_batch, sampling.source(3), step=3)
    assert [one.prompt_ids for one in batch.sequences] == [one.prompt_ids for one in sequences()]
    assert [one.answer_ids for one in batch.sequences] != [one.answer_ids for one in sequences()]
    again = student()
    expected = objective()(again, batch, step=3)
    expected.total.backward()
    torch.testing.assert_close(terms.total, expected.total)
    torch.testing.assert_close(gradients(model), gradients(again))
    assert float(terms.terms["sampled"]) == terms.count == sum(len(one.answer_ids) for one in batch.sequences)


def test_micro_batches_change_neither_loss_nor_gradient_of_a_step_on_samples() -> None:
    whole, parts = student(), student()
    data, on_policy = StudentData(sequences(), sampled_tokens=6), objective(on_policy_share=1.0)
    for model, budget in ((whole, 1000), (parts, 1)):
        batches = list(data.micro_batches(range(3), budget))
        assert len(batches) == (1 if model is whole else 3)
        total = sum(on_policy(model, batch, 1).total for batch in batches)
        total.backward()
    torch.testing.assert_close(gradients(whole), gradients(parts), rtol=1e-4, atol=1e-5)


def test_the_token_budget_counts_answers_that_are_yet_to_be_sampled() -> None:
    examples = [Sequence(list(range(10, 20)), 5, f"example-{index}") for index in range(4)]
    assert [len(batch.sequences) for batch in StudentData(examples).micro_batches(range(4), 40)] == [4]
    room = StudentData(examples, sampled_tokens=15).micro_batches(range(4), 40)
    assert [len(batch.sequences) for batch in room] == [2, 2]


def cache(directory: Path, examples: Items[Sequence], model: LlamaForCausalLM) -> Path:
    ids = [example.example_id for example in examples]
    shards = compute_shards(directory / "work", [ids], lambda wanted: targets(model, list(examples), 64))
    settings = CacheSettings(
        prompt_format="plain", max_length=32, response_room=1, precision="fp32", train_examples=None, batch_tokens=64
    )
    step = TeacherStep(model=directory, data=directory, output=directory, work=directory, cache=settings)
    with RunRecord(MODULE, step, {}) as record:
        publish_cache(directory / "cache", shards, CacheFacts("hidden", 384, 0, "float32"), output_head(model), record)
    return directory / "cache"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_targets_give_the_loss_of_online_ones(temperature: float, tmp_path: Path) -> None:
    model = student()
    teacher = CachedTeacher(cache(tmp_path, sequences(), tiny_llama()), model)
    [micro_batch] = StudentData(sequences()).micro_batches(range(3), 1000)
    cached = objective(teacher, beta=0.5, temperature=temperature)(model, micro_batch, 1)
    online = objective(beta=0.5, temperature=temperature)(model, micro_batch, 1)
    torch.testing.assert_close(cached.total, online.total, rtol=1e-5, atol=1e-6)


def test_a_cache_of_another_teacher_or_of_other_answers_is_refused(tmp_path: Path) -> None:
    model = student()
    directory = cache(tmp_path, sequences(), tiny_llama())
    other = copy.deepcopy(sequences()[0])
    other.input_ids[-1] += 1
    [micro_batch] = StudentData([other]).micro_batches(range(1), 1000)
    with pytest.raises(UserError, match="holds other answers of these examples"):
        CachedTeacher(directory, model).logits(micro_batch)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    with pytest.raises(UserError, match="is no cache of this teacher"):
        CachedTeacher(directory, model)
