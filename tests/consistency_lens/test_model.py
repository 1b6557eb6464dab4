"""The lens against its naive forms, and what its three roles share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from stillhouse.models.activations import swapped
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.studies.consistency_lens.controls import continuations
from stillhouse.studies.consistency_lens.data import Example
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.objective import LensObjective
from stillhouse.studies.consistency_lens.run_settings import LensSchedules, LossSettings
from stillhouse.training.optimizers import ParameterGroup, build_optimizer, set_learning_rate
from tests.consistency_lens.lenses import (
    documents,
    lens_batch,
    lens_settings,
    naive_explanation,
    naive_original_logits,
    naive_reconstruction,
    perturbed,
    tiny_lens,
)
from tests.support.tiny_models import make_tiny_tokenizer

EVERYTHING: dict[str, Any] = {
    "decoder": {
        "prompt_text": "The word <embed> means:",
        **{part: {"trained": True} for part in ("base", "embeddings", "output_head")},
    },
    "encoder": {
        "prompt_text": "It says <text>",
        "output_layer": 1,
        **{part: {"trained": True} for part in ("base", "embeddings")},
    },
}
# The same parts, all frozen at first; decoder.prompt learns from the start.
LATER: dict[str, Any] = {
    role: {
        name: part | {"unfreezing": "0, hold 1e, linear to 1 over 1e"} if isinstance(part, dict) else part
        for name, part in parts.items()
    }
    for role, parts in EVERYTHING.items()
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Rotary and learned positions."""
    if request.param == "llama":
        return tiny_model
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def activations() -> Tensor:
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(5))


def gradients(lens: Lens, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*lens.trained_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["frozen", "everything trained"])
def test_the_cached_decoder_equals_the_uncached_one_in_values_and_gradients(
    model_dir: Path, activations: Tensor, noisy: bool, changes: dict[str, Any]
) -> None:
    lens = perturbed(tiny_lens(model_dir, **changes))
    towards = torch.randn(3, 32)

    def loss(ids: Tensor, embeddings: Tensor, logits: Tensor) -> Tensor:
        return (naive_reconstruction(lens, embeddings) * towards).sum() + logits.log_softmax(-1)[..., 3].sum()

    torch.manual_seed(11)
    expected = naive_explanation(lens, activations, 0.7, noisy)
    torch.manual_seed(11)
    found = lens.explain(activations, temperature=0.7, gumbel_noise=noisy)
    assert torch.equal(found.token_ids, expected[0])
    torch.testing.assert_close(found.embeddings, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, expected[2], atol=1e-4, rtol=1e-4)

    expected_gradients = gradients(lens, loss(*expected))
    found_gradients = gradients(lens, loss(found.token_ids, found.embeddings, found.logits))
    assert {name.partition(".")[0] for name in found_gradients} == {"decoder", "encoder"}
    torch.testing.assert_close(found_gradients, expected_gradients, atol=2e-3, rtol=2e-3)


def test_the_encoder_equals_its_naive_form(model_dir: Path) -> None:
    lens = perturbed(tiny_lens(model_dir))
    text = torch.randn(2, 4, 32)
    torch.testing.assert_close(lens.reconstruct(text), naive_reconstruction(lens, text))


def test_reconstruction_from_tokens_equals_that_from_their_embeddings(model_dir: Path, activations: Tensor) -> None:
    lens = perturbed(tiny_lens(model_dir, **EVERYTHING))
    with torch.no_grad():
        lens.encoder.base.get_input_embeddings().weight.add_(0.1)
        explanation = lens.explain(activations)
        torch.testing.assert_close(
            lens.reconstruct_tokens(explanation.token_ids), lens.reconstruct(explanation.embeddings)
        )


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_logits_with_a_swapped_activation_equal_those_of_a_whole_pass(model_dir: Path, layer: int) -> None:
    lens = tiny_lens(model_dir, layer=layer)
    ids, mask, positions = documents()
    other = torch.randn(len(ids), 32, requires_grad=True)
    expected = naive_original_logits(lens, ids, mask, positions, other)
    found = lens.original_logits(ids, mask, positions, other)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    [expected_gradient] = torch.autograd.grad(expected.square().sum(), other)
    [found_gradient] = torch.autograd.grad(found.square().sum(), other)
    torch.testing.assert_close(found_gradient, expected_gradient, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_swapping_an_activation_for_itself_changes_no_logit(model_dir: Path, layer: int) -> None:
    lens = tiny_lens(model_dir, layer=layer)
    reading = lens.read(*documents())
    own = lens.chosen_activations(reading)
    assert torch.equal(lens.next_token_logits(reading, own), lens.next_token_logits(reading))
    torch.testing.assert_close(own, lens.activations_of(*documents()), atol=1e-4, rtol=1e-4)
    plain = lens.original(input_ids=documents()[0]).logits[torch.arange(3), documents()[2]]
    torch.testing.assert_close(lens.next_token_logits(reading), plain, atol=1e-4, rtol=1e-4)


def test_a_document_that_begins_with_the_chosen_token_has_no_past(model_dir: Path) -> None:
    lens = tiny_lens(model_dir)
    ids, mask, positions = (
        torch.tensor([[7], [9]]),
        torch.ones(2, 1, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
    )
    torch.testing.assert_close(lens.original_logits(ids, mask, positions), lens.original(ids).logits[:, 0])


def test_frozen_weights_are_one_copy_in_memory_and_trained_parts_are_their_own(model_dir: Path) -> None:
    lens = tiny_lens(model_dir, decoder=EVERYTHING["decoder"])
    original = dict(lens.original.named_parameters())
    assert all(parameter is original[name] for name, parameter in lens.encoder.base.named_parameters())
    assert not any(parameter.requires_grad for parameter in original.values())
    ours = {parameter.data_ptr() for parameter in lens.decoder.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in original.values()}
    assert all(parameter.requires_grad for parameter in lens.decoder.parameters())


def test_a_part_that_learns_later_lies_in_the_original_s_memory(model_dir: Path) -> None:
    lens = tiny_lens(model_dir, **LATER)
    parts = lens.part_parameters()
    for name in ("decoder.base", "decoder.embeddings", "decoder.output_head", "encoder.base"):
        for path, own in parts[name].items():
            original = lens.original.get_parameter(path.partition(".base.")[2])
            assert own is not original and own.data_ptr() == original.data_ptr() and not own.requires_grad
    frozen_lens = tiny_lens(model_dir, encoder={"prompt_text": "It says <text>", "output_layer": 1})
    memory = [{own.data_ptr(): own.nbytes for own in each.parameters()} for each in (lens, frozen_lens)]
    assert len(memory[0]) == len(memory[1]) and sum(memory[0].values()) == sum(memory[1].values())


def test_parts_are_told_apart_by_module(model_dir: Path) -> None:
    lens = tiny_lens(model_dir, **EVERYTHING)
    parts = lens.part_parameters()
    assert list(parts) == list(lens.settings.trained)
    names = [name for parameters in parts.values() for name in parameters]
    assert len(names) == len(set(names)) == sum(1 for _ in lens.trained_parameters())
    assert set(names) == {name for name, parameter in lens.named_parameters() if parameter.requires_grad}
    [head] = parts["decoder.output_head"]
    assert head == "decoder.base.lm_head.weight"


def test_a_prompt_that_is_the_place_alone_has_nothing_to_train(model_dir: Path) -> None:
    lens = tiny_lens(model_dir, encoder={"prompt_text": "<text>", "output_layer": 1})
    assert "encoder.prompt" not in lens.part_parameters()
    assert lens.reconstruct(torch.randn(2, 3, 32)).shape == (2, 32)


@pytest.mark.parametrize(("output_layer", "layer"), [(-1, 2), (0, 0), (1, 1)])
def test_the_output_layer_is_the_one_asked_for_and_the_identity_passes_it_on(
    model_dir: Path, output_layer: int, layer: int
) -> None:
    lens = tiny_lens(model_dir, encoder={"prompt_text": "<text>", "output_layer": output_layer})
    tokens = torch.tensor([[5, 8, 13]])
    expected = (
        lens.original(tokens, output_hidden_states=True).hidden_states[layer][:, -1]
        if layer < 2
        else lens.activations_of(tokens, torch.ones_like(tokens), torch.tensor([2]))
    )
    if layer == 2:
        expected = tiny_lens(model_dir, layer=2).activations_of(tokens, torch.ones_like(tokens), torch.tensor([2]))
    torch.testing.assert_close(lens.reconstruct_tokens(tokens), expected)


def test_recomputation_changes_neither_values_nor_gradients(model_dir: Path, activations: Tensor) -> None:
    lens = perturbed(tiny_lens(model_dir, **EVERYTHING))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        explanation = lens.explain(activations)
        reconstruction = lens.reconstruct(explanation.embeddings)
        results.append((reconstruction, gradients(lens, reconstruction.square().sum())))
        lens.gradient_checkpointing_enable()
    torch.testing.assert_close(results[1], results[0])


def test_frozen_bases_stay_in_evaluation_mode(model_dir: Path) -> None:
    lens = tiny_lens(model_dir, decoder=EVERYTHING["decoder"]).train()
    assert not any(module.training for module in (*lens.original.modules(), *lens.encoder.base.modules()))
    assert all(module.training for module in lens.decoder.base.modules())
    assert not any(module.training for module in lens.eval().modules())


def test_a_checkpoint_restores_the_lens(model_dir: Path, activations: Tensor, tmp_path: Path) -> None:
    lens = perturbed(tiny_lens(model_dir))
    save_file({name: p.detach().clone() for name, p in lens.trained_parameters()}, tmp_path / "model.safetensors")
    restored = Lens.load(model_dir, tmp_path, lens_settings(), "fp32", "cpu")
    first, second = (each.explain(activations, gumbel_noise=False) for each in (lens, restored))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(lens.reconstruct(first.embeddings), restored.reconstruct(second.embeddings))
    assert not any(parameter.requires_grad for parameter in restored.parameters())
    with pytest.raises(UserError, match="is of a lens that trains other parts, or of another model"):
        Lens.load(model_dir, tmp_path, lens_settings(encoder=EVERYTHING["encoder"]), "fp32", "cpu")
    assert load_file(tmp_path / "model.safetensors")


def test_a_checkpoint_with_half_a_part_is_refused(model_dir: Path, tmp_path: Path) -> None:
    lens = tiny_lens(model_dir, **LATER)
    learnt = {name: own.detach().clone() for name, own in lens.trained_parameters() if own.requires_grad}
    save_file(learnt, tmp_path / "model.safetensors")
    Lens.load(model_dir, tmp_path, lens_settings(**LATER), "fp32", "cpu")
    name, half = next(iter(lens.part_parameters()["encoder.base"].items()))
    save_file(learnt | {name: half.detach().clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is of a lens that trains other parts, or of another model"):
        Lens.load(model_dir, tmp_path, lens_settings(**LATER), "fp32", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, r"lens\.layer: 3 is out of range: the model has layers 0 \(embeddings\) to 2"),
        ({"encoder": {"output_layer": 7}}, r"lens\.encoder\.output_layer: 7 is out of range"),
        ({"frozen_8bit": True}, r"lens\.frozen_8bit: bitsandbytes is not installed: pip install bitsandbytes"),
        ({"attention": "flash_attention_2"}, r"lens\.attention: flash_attn is not installed: .* or set it to sdpa"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        tiny_lens(tiny_model, **changes)


def test_attention_is_the_one_asked_for_and_computes_the_same(model_dir: Path, activations: Tensor) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        lens = tiny_lens(model_dir, attention=attention)
        bases = (lens.original, lens.decoder.base, lens.encoder.base)
        assert [base.config._attn_implementation for base in bases] == [attention] * 3
        explanation = lens.explain(activations, gumbel_noise=False)
        read = lens.original_logits(*documents(), activations)
        found.append((explanation.logits, lens.reconstruct(explanation.embeddings), read))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_switched_as_asked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        monkeypatch.setattr(backend, "allow_tf32", not tf32)
    tiny_lens(tiny_model, tf32=tf32)
    assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]


def test_frozen_weights_in_8_bit_are_shared_and_gradients_pass_through_them(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trained = {"prompt_text": "The word <embed> means:", "base": {"trained": True}}
    lens = tiny_lens(tiny_model, frozen_8bit=True, decoder=trained)
    [original, decoder, encoder] = (
        base.model.layers[0].mlp.up_proj.weight for base in (lens.original, lens.decoder.base, lens.encoder.base)
    )
    assert original.dtype == torch.int8 and encoder is original
    assert decoder.dtype == torch.float32 and decoder.requires_grad
    lens.reconstruct(lens.explain(torch.randn(2, 32)).embeddings).square().sum().backward()
    assert decoder.grad is not None and lens.decoder.projection.weight.grad is not None


def test_in_8_bit_a_part_that_learns_later_is_in_full_precision_once_for_both_roles(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    lens = tiny_lens(tiny_model, frozen_8bit=True, **LATER)
    [original, decoder, encoder] = (
        base.model.layers[0].mlp.up_proj.weight for base in (lens.original, lens.decoder.base, lens.encoder.base)
    )
    assert original.dtype == torch.int8 and decoder.dtype == torch.float32
    assert decoder.data_ptr() == encoder.data_ptr() != original.data_ptr()


@pytest.mark.slow
def test_a_compiled_part_goes_on_with_its_own_weights_once_it_learns(
    tiny_model: Path, activations: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    plain, compiled = (perturbed(tiny_lens(tiny_model, compile=switch, **LATER)) for switch in (False, True))

    def computed(lens: Lens) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        reconstruction = lens.reconstruct(lens.explain(activations).embeddings)
        lens.zero_grad()
        reconstruction.square().sum().backward()
        return reconstruction, {n: own.grad.clone() for n, own in lens.trained_parameters() if own.grad is not None}

    torch.testing.assert_close(computed(compiled), computed(plain), atol=1e-4, rtol=1e-4)
    for lens in (plain, compiled):
        groups = [ParameterGroup(n, own, schedule=lambda step: 1.0) for n, own in lens.part_parameters().items()]
        optimizer = build_optimizer(groups, 1e-2, 0.0)
        set_learning_rate(optimizer, 1e-2, step=1)
        with torch.no_grad():
            lens.decoder.base.model.layers[0].mlp.up_proj.weight.add_(0.3)
    found, expected = computed(compiled), computed(plain)
    assert any(name.startswith("decoder.base.model.layers.1") for name in expected[1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_whatever_is_swapped_or_read_in_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and guarded as always, but not turned into C++, which takes minutes: the benchmark `compiled_lens` does,
    # and compares.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # torch would run a block as it is, with a warning, where it had to be compiled too often.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    plain, compiled = (perturbed(tiny_lens(tiny_model, compile=switch)) for switch in (False, True))
    objective = LensObjective(LossSettings(mse=0.5, resample_stop_gradient=False), LensSchedules(), steps_per_epoch=4)
    ids, _, positions = documents()
    examples = [Example(str(row), ids[row], int(place)) for row, place in enumerate(positions)]
    places = torch.full((3,), int(positions.max()))

    def computed(lens: Lens, cached: bool) -> tuple[Any, ...]:
        torch.manual_seed(2)
        loss = objective(lens, lens_batch(lens, cached=cached), step=9)
        found = gradients(lens, loss.total)
        with swapped(lens.original, lens.settings.layer, places, torch.full((3, 32), 2.0)):
            foreign = continuations(lens.original, examples, 3, cached=False)
        own = continuations(lens.original, examples, 3, cached=False)
        assert not torch.equal(foreign, own)
        return loss.total, loss.terms, found, foreign, own

    for cached in (True, False, True):
        expected = computed(plain, cached)
        assert len(expected[2]) == 6
        torch.testing.assert_close(computed(compiled, cached), expected, atol=1e-4, rtol=1e-4)


def test_the_lens_runs_in_bf16_with_its_projections_exact(tiny_model: Path) -> None:
    lens = Lens.build(tiny_model, lens_settings(), "bf16", "cpu")
    activations = torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(lens.decoder.project(activations), activations)
        explanation = lens.explain(activations)
        assert lens.reconstruct(explanation.embeddings).dtype == torch.float32
    assert lens.explain(activations).logits.dtype == torch.bfloat16
    model, tokenizer = load_model(tiny_model, "bf16", "cpu"), load_tokenizer(tiny_model)
    assert model.dtype == torch.bfloat16 and len(tokenizer("means:").input_ids) > 0
