"""Sampled answers: from the right distribution, within their lengths, and the same whatever the batch."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from support.tiny_models import tiny_llama_config
from transformers import LlamaForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import LoraSettings
from stillhouse.data.packing import Sequence
from stillhouse.models.lora import add_lora
from stillhouse.models.quantized_lora import as_teacher, fake_quantized
from stillhouse.studies.quantized_distillation.run_settings import SamplingSettings
from stillhouse.studies.quantized_distillation.sampling import draw, sample, with_sampled_answers

STOPS = (7, 9)


def student() -> PeftModel:
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(tiny_llama_config()), LoraSettings(rank=4, alpha=8, dropout=0.5), seed=0)
    return fake_quantized(model, WeightFormat(group_size=16)).train()


def prompts(count: int = 5) -> list[Sequence]:
    drawing = torch.Generator().manual_seed(3)
    lengths = [3, 8, 5, 12, 4]
    return [
        Sequence([*torch.randint(10, 384, (length,), generator=drawing).tolist(), 7], length, f"example-{index}")
        for index, length in enumerate(lengths[:count])
    ]


def test_near_zero_temperature_gives_the_greedy_answers_of_transformers() -> None:
    model, settings = student(), SamplingSettings(temperature=1e-6, min_new_tokens=2, max_new_tokens=6)
    ours = with_sampled_answers(model, prompts(), settings, STOPS, seed=0, step=1)
    model.eval()
    for sequence in ours:
        generated = model.generate(
            input_ids=torch.tensor([sequence.prompt_ids]),
            do_sample=False,
            min_new_tokens=2,
            max_new_tokens=6,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        assert sequence.input_ids == generated[0].tolist()


def test_an_answer_depends_on_seed_step_and_example_and_not_on_its_batch() -> None:
    model, settings = student(), SamplingSettings(min_new_tokens=2, max_new_tokens=8)

    def answers(sequences: list[Sequence], seed: int = 0, step: int = 1) -> dict[str, list[int]]:
        sampled = with_sampled_answers(model, sequences, settings, STOPS, seed, step)
        return {sequence.example_id: sequence.answer_ids for sequence in sampled}

    together = answers(prompts())
    torch.manual_seed(99)  # the global generators have no say
    alone = {name: answer for sequence in prompts() for name, answer in answers([sequence]).items()}
    assert together == alone == answers(list(reversed(prompts())))
    assert together != answers(prompts(), step=2)
    assert together != answers(prompts(), seed=1)


def test_answers_keep_their_shortest_and_longest_length_and_end_with_the_stop_token() -> None:
    model, often = student(), tuple(range(7, 60))  # so many stop tokens that some come early
    settings = SamplingSettings(min_new_tokens=3, max_new_tokens=9)
    answers = [
        sequence.answer_ids
        for step in range(1, 6)
        for sequence in with_sampled_answers(model, prompts(), settings, often, 0, step)
    ]
    assert {len(answer) for answer in answers} >= {4, 9}
    for answer in answers:
        assert 4 <= len(answer) <= 9
        assert not set(answer[:-1]) & set(often)
        assert len(answer) == 9 or answer[-1] in often


def test_sampling_leaves_modes_and_gradients_alone_and_the_teacher_samples_for_itself() -> None:
    model, settings = student(), SamplingSettings(min_new_tokens=2, max_new_tokens=6)
    modes = [module.training for module in model.modules()]
    own = with_sampled_answers(model, prompts(), settings, STOPS, 0, 1)
    with as_teacher(model):
        taught = with_sampled_answers(model, prompts(), settings, STOPS, 0, 1)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(tiny_llama_config())
    assert taught == with_sampled_answers(teacher, prompts(), settings, STOPS, 0, 1)
    assert [item.prompt_ids for item in own] == [item.prompt_ids for item in prompts()]


def test_draws_follow_the_distribution_and_never_take_what_is_impossible() -> None:
    logits = torch.tensor([2.0, -torch.inf, 1.0, 0.0, -torch.inf]).expand(20_000, -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = draw(logits, uniforms).bincount(minlength=5) / 20_000
    torch.testing.assert_close(counts, logits[0].softmax(-1), rtol=0, atol=0.01)
    assert counts[1] == counts[4] == 0
    edges = draw(logits[:2], torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edges.tolist() == [0, 3]


@pytest.mark.parametrize("longest", [1, 4])
def test_a_sample_is_what_a_pass_without_a_cache_gives(longest: int) -> None:
    model = student().eval()
    settings = SamplingSettings(temperature=0.9, min_new_tokens=0, max_new_tokens=longest)
    sequences = prompts()
    uniforms = torch.rand(len(sequences), longest, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        answers = sample(model, [item.prompt_ids for item in sequences], uniforms, settings, STOPS)
        for item, answer, row in zip(sequences, answers, uniforms, strict=True):
            ids = list(item.prompt_ids)
            for place, token in enumerate(answer):
                logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
                assert draw(logits / 0.9, row[place : place + 1]).item() == token
                ids.append(token)
