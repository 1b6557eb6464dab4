"""Delta activations: the definition, for one adapter or many, for teachers and students by the same probes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora_tensors import AdapterTensors, model_layout, stacked, write_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.deltas import Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.probes import BY_DOMAIN, GENERIC, MIXED, Domain, ProbeSettings
from tests.lora_generation.adapters import random_adapter


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return frozen(load_model(tiny_model, "fp32", "cpu"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def adapter(model: PreTrainedModel, seed: int) -> AdapterTensors:
    return random_adapter(model_layout(model, ("q_proj", "v_proj"), 3, 6), seed, size=0.2)


def probes_of(settings: ProbeSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Probes:
    return Probes.tokenise(settings, tokenizer, model)


@pytest.mark.parametrize("formatting", ["plain", "chat"])
def test_a_delta_is_the_mean_change_of_the_last_real_tokens_state(
    formatting: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tiny_model: Path, tmp_path: Path
) -> None:
    settings = ProbeSettings.model_validate({"kind": "mixed", "formatting": formatting, "max_length": 512})
    probes = probes_of(settings, tokenizer, model)
    own = adapter(model, 1)
    write_adapter(own, tmp_path, "tiny")
    merged = PeftModel.from_pretrained(load_model(tiny_model, "fp32", "cpu"), str(tmp_path)).merge_and_unload()
    changes = []
    for text in settings.texts:
        if formatting == "chat":
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text).input_ids])
        states = [m(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1] for m in (merged, model)]
        changes.append((states[0] - states[1]).detach())
    delta = delta_activation(model, own, probes, base_activation(model, probes))
    torch.testing.assert_close(delta, torch.stack(changes).mean(0), atol=2e-5, rtol=1e-4)
    assert delta.norm() > 0.1


def test_many_adapters_in_one_pass_have_the_deltas_of_each_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    probes = probes_of(ProbeSettings(kind="generic"), tokenizer, model)
    changed = probes_of(ProbeSettings(kind="generic", engine="functional_call"), tokenizer, model)
    base = base_activation(model, probes)
    batch = stacked([adapter(model, seed) for seed in (1, 2, 3)])
    together = delta_activation(model, batch, probes, base)
    alone = torch.stack([delta_activation(model, one, probes, base) for one in batch])
    assert together.shape == (3, model.config.hidden_size)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta_activation(model, batch, changed, base), alone, atol=1e-5, rtol=1e-5)


def test_both_engines_have_equal_gradients(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    gradients = []
    for engine in ("hooks", "functional_call"):
        probes = probes_of(ProbeSettings.model_validate({"kind": "generic", "engine": engine}), tokenizer, model)
        own = stacked([adapter(model, 1), adapter(model, 2)]).map(lambda tensor: tensor.requires_grad_())
        delta = delta_activation(model, own, probes, base_activation(model, probes))
        gradients.append(torch.autograd.grad(delta.square().sum(), [*own.a.values(), *own.b.values()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        assert ours.abs().max() > 1e-3


def test_no_adapter_makes_no_difference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    probes = probes_of(ProbeSettings(kind="generic"), tokenizer, model)
    nothing = adapter(model, 1).map(torch.zeros_like)
    assert delta_activation(model, nothing, probes, base_activation(model, probes)).abs().max() == 0


def test_deltas_are_fp32_whatever_surrounds_them(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    probes = probes_of(ProbeSettings(kind="generic"), tokenizer, model)
    base, own = base_activation(model, probes), adapter(model, 1)
    expected = delta_activation(model, own, probes, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_activation(model, own, probes, base), expected)
    with pytest.raises(ValueError, match="need a model in fp32"):
        base_activation(frozen(load_model(model.name_or_path, "fp32", "cpu")).bfloat16(), probes)


def test_probes_are_five_five_of_a_domain_or_fifteen() -> None:
    assert len(GENERIC) == 5
    assert {domain: len(texts) for domain, texts in BY_DOMAIN.items()} == dict.fromkeys(get_args(Domain), 5)
    assert len(set(MIXED)) == 15
    assert ProbeSettings(kind="domain", domain="reading").texts == BY_DOMAIN["reading"]
    with pytest.raises(ValueError, match="is for kind domain"):
        ProbeSettings(kind="generic", domain="reading")


def test_a_probe_is_never_cut(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"probes: text 1 of kind generic has \d+ tokens, probes.max_length is 4"):
        probes_of(ProbeSettings(kind="generic", max_length=4), tokenizer, model)
    small = frozen(load_model(model.name_or_path, "fp32", "cpu"))
    small.config.max_position_embeddings = 10
    with pytest.raises(UserError, match=rf"text 1 .* has \d+ tokens, the context of {model.name_or_path} is 10"):
        probes_of(ProbeSettings(kind="generic"), tokenizer, small)


def test_chat_probes_need_a_chat_template(model: PreTrainedModel, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        probes_of(ProbeSettings(formatting="chat"), tokenizer, model)
