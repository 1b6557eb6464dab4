"""Reading and swapping the residual stream: exact, differentiable, and nothing written in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
)

from stillhouse.models.activations import blocks, captured, residual_stream, swapped
from stillhouse.models.loading import load_model
from stillhouse.runtime.errors import UserError
from tests.support.tiny_models import tiny_llama_config

TOKENS = torch.tensor([[5, 9, 2, 7, 1], [3, 3, 8, 4, 6]])
COLUMNS = torch.tensor([1, 3])
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "blocks return tensors": tiny_llama_config(64),
    "learned positions": GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4),
    "blocks return tuples": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(request.param).eval()


def outputs_of_a_block(model: PreTrainedModel) -> type:
    kinds: list[type] = []
    handle = blocks(model)[0].register_forward_hook(lambda module, arguments, output: kinds.append(type(output)))
    model(TOKENS)
    handle.remove()
    return kinds[0]


def test_the_architectures_cover_tensor_and_tuple_outputs() -> None:
    kinds = {
        name: outputs_of_a_block(AutoModelForCausalLM.from_config(config).eval())
        for name, config in ARCHITECTURES.items()
    }
    assert issubclass(kinds["blocks return tuples"], tuple)
    assert kinds["blocks return tensors"] is torch.Tensor


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_is_the_hidden_state_of_the_same_number(model: PreTrainedModel, layer: int) -> None:
    expected = model(TOKENS, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(residual_stream(model, layer, input_ids=TOKENS), expected, atol=0, rtol=0)


def test_the_last_layer_is_what_the_final_norm_reads(model: PreTrainedModel) -> None:
    found: list[torch.Tensor] = []
    norms = [module for name, module in model.base_model.named_children() if name in ("norm", "ln_f")]
    norms[0].register_forward_pre_hook(lambda module, arguments: found.append(arguments[0]))
    model(TOKENS)
    torch.testing.assert_close(residual_stream(model, 2, input_ids=TOKENS), found[0], atol=0, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_swapping_an_activation_for_itself_changes_no_logit(model: PreTrainedModel, layer: int) -> None:
    expected = model(TOKENS).logits
    own = residual_stream(model, layer, input_ids=TOKENS)[torch.arange(2), COLUMNS]
    with swapped(model, layer, COLUMNS, own):
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_swap_changes_its_own_position_and_what_follows_and_ends_with_the_context(
    model: PreTrainedModel, layer: int
) -> None:
    before = model(TOKENS).logits
    with swapped(model, layer, COLUMNS, torch.randn(2, 32)), captured(model, layer) as found:
        changed = model(TOKENS).logits
    different = (changed != before).any(-1)
    first = different.int().argmax(1)
    assert first.tolist() == COLUMNS.tolist()
    assert len(found) == 1
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_is_written_in_place(model: PreTrainedModel, layer: int) -> None:
    with captured(model, layer) as untouched, swapped(model, layer, COLUMNS, torch.randn(2, 32)):
        model(TOKENS)
    torch.testing.assert_close(untouched[0], residual_stream(model, layer, input_ids=TOKENS), atol=0, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_of_a_swap_equal_finite_differences(layer: int) -> None:
    torch.manual_seed(0)
    # In fp64 throughout: Llama's norms compute in fp32 whatever the type.
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config).double().eval()

    def logits(activations: torch.Tensor) -> torch.Tensor:
        with swapped(model, layer, COLUMNS, activations):
            return model(TOKENS % 11).logits[:, -1]

    assert torch.autograd.gradcheck(logits, (torch.randn(2, 4, dtype=torch.float64, requires_grad=True),))


def test_a_layer_that_the_model_lacks_is_refused(tiny_model: Path) -> None:
    model = load_model(tiny_model, "fp32", "cpu")
    with pytest.raises(UserError, match=r"layer: 3 is out of range: the model has layers 0 \(embeddings\) to 2"):
        residual_stream(model, 3, input_ids=TOKENS)
