"""Gold NLL and shared-prefix forward passes against the plain forward pass over whole sequences, in fp32."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stillhouse.data.packing import Sequence
from stillhouse.evaluation.perplexity import AnswerNll, answer_nll
from stillhouse.models.prefix import (
    encode_prefix,
    shared_prefix_length,
    suffix_hidden_states,
    suffix_logits,
    token_batches,
)

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make_model(kind: str) -> nn.Module:
    """A random model of one family; Gemma's sliding window is shorter than the shared prefix."""
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=layers, final_logit_softcapping=2.0)
    ).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make_model(request.param)


def few_shot_sequences(count: int = 7, shared: int = 21) -> list[Sequence]:
    """Prompts that share their first `shared` tokens and differ right after, with answers of several lengths."""
    generator = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(5, VOCABULARY) for _ in range(length)]

    prefix, sequences = tokens(shared), []
    for index in range(count):
        prompt = [*prefix, index % 5, *tokens(generator.randint(1, 9))]
        sequences.append(Sequence(prompt + tokens(generator.randint(1, 12)), len(prompt), f"example-{index}"))
    return sequences


def naive_nll(model: nn.Module, sequence: Sequence) -> AnswerNll:
    """The definition: one sequence at a time, logits of every position, log-softmax in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].double()
    rows = logits[sequence.answer_start - 1 : -1].log_softmax(-1)
    labels = torch.tensor(sequence.answer_ids)
    return AnswerNll(-rows.gather(1, labels[:, None]).sum().item(), len(labels))


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_gold_nll_equals_the_naive_one(model: nn.Module, share_prefix: bool, batch_tokens: int) -> None:
    sequences = few_shot_sequences()
    results = answer_nll(model, sequences, batch_tokens, share_prefix=share_prefix)
    for result, sequence in zip(results, sequences, strict=True):
        expected = naive_nll(model, sequence)
        assert result.tokens == expected.tokens
        assert result.sum_nats == pytest.approx(expected.sum_nats, rel=1e-5)


def test_a_shared_prefix_is_computed_once() -> None:
    model, sequences = make_model("llama"), few_shot_sequences()
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].numel()))
    answer_nll(model, sequences, 40, share_prefix=True)
    longest = max(len(sequence) for sequence in sequences) - 21
    assert lengths[0] == 21 and len(lengths) > 2
    assert sum(lengths[1:]) <= len(sequences) * longest


def test_only_answer_rows_reach_the_output_embeddings() -> None:
    model, sequences = make_model("llama"), few_shot_sequences()
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    answer_nll(model, sequences, share_prefix=True)
    hook.remove()
    assert sum(rows) == sum(len(sequence.answer_ids) + 1 for sequence in sequences)


def test_dropout_is_off_while_scoring_and_the_mode_restored() -> None:
    model, sequences = make_model("llama").train(), few_shot_sequences(2)
    assert answer_nll(model, sequences) == answer_nll(model, sequences)
    assert model.training


def test_the_adapter_that_is_on_is_the_one_that_is_scored() -> None:
    sequences = few_shot_sequences(3)
    plain = answer_nll(make_model("llama"), sequences)
    configuration = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(make_model("llama"), configuration)
    with_adapter = answer_nll(adapted, sequences, share_prefix=True)
    assert [item.sum_nats for item in with_adapter] != pytest.approx([item.sum_nats for item in plain], rel=1e-4)
    with adapted.disable_adapter():
        without = answer_nll(adapted, sequences, share_prefix=True)
    assert [item.sum_nats for item in without] == pytest.approx([item.sum_nats for item in plain], rel=1e-5)


def test_no_sequences_give_no_scores() -> None:
    assert answer_nll(make_model("llama"), [], share_prefix=True) == []


def test_one_prefix_serves_batches_of_any_size(model: nn.Module) -> None:
    sequences = few_shot_sequences()
    prefix = encode_prefix(model, sequences[0].input_ids[:21])
    assert prefix is not None and len(prefix) == 21
    suffixes = [sequence.input_ids[21:] for sequence in sequences]
    starts = [sequence.answer_start - 22 for sequence in sequences]
    with torch.no_grad():
        together = suffix_logits(model, suffixes, starts, prefix)
        alone = [suffix_logits(model, [ids], [start], prefix)[0] for ids, start in zip(suffixes, starts, strict=True)]
        whole = [model(input_ids=torch.tensor([sequence.input_ids])).logits[0] for sequence in sequences]
    for sequence, first, second, logits in zip(sequences, together, alone, whole, strict=True):
        assert first.shape == (len(sequence.answer_ids) + 1, VOCABULARY)
        torch.testing.assert_close(first, logits[sequence.answer_start - 1 :], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_hidden_states_are_what_the_output_embeddings_read() -> None:
    model, sequences = make_model("qwen3"), few_shot_sequences()
    prefix = encode_prefix(model, sequences[0].input_ids[:21])
    arguments = ([s.input_ids[21:] for s in sequences], [s.answer_start - 22 for s in sequences], prefix)
    with torch.no_grad():
        hidden, logits = suffix_hidden_states(model, *arguments), suffix_logits(model, *arguments)
        for states, rows in zip(hidden, logits, strict=True):
            torch.testing.assert_close(model.lm_head(states), rows, atol=1e-6, rtol=1e-5)


def test_gradients_flow_through_suffixes_without_a_prefix() -> None:
    model, sequences = make_model("llama"), few_shot_sequences(2)
    suffix_logits(model, [s.input_ids for s in sequences], [3, 4])[0].sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_the_shared_prefix_ends_before_the_row_that_predicts_the_first_answer_token() -> None:
    assert shared_prefix_length([[1, 2, 3, 4], [1, 2, 5, 4]], [3, 3]) == 2
    assert shared_prefix_length([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 4]) == 2
    assert shared_prefix_length([[1, 2], [2, 1]], [1, 1]) == 0
    assert shared_prefix_length([[1, 2, 3]], [2]) == 1
    assert shared_prefix_length([], []) == 0


def test_a_wanted_row_outside_the_suffix_is_an_error() -> None:
    with pytest.raises(ValueError, match="first wanted row -1"):
        suffix_logits(make_model("llama"), [[1, 2]], [-1])


def test_batches_hold_every_sequence_once_within_the_token_budget() -> None:
    lengths = [random.Random(1).randint(1, 50) for _ in range(40)] + [500]
    batches = list(token_batches(lengths, 100))
    assert sorted(index for batch in batches for index in batch) == list(range(41))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches if len(batch) > 1)
    assert batches[0] == [40]
