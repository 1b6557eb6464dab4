"""Encoders: padding and companions never reach Z, and a text that does not fit is refused, never cut silently."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from latentwire.tiny_readers import TEXTS, make_families, tiny_reader
from support.tiny_models import make_tiny_sentence_encoder
from torch import nn

from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.encoders import (
    ByteEncoder,
    LanguageModelEncoder,
    LatentPooling,
    SentenceEncoder,
    TextEncoder,
    sinusoids,
)
from stillhouse.studies.latentwire.run_settings import EncoderSettings, LatentSettings

LATENT = LatentSettings(length=4, dimension=8)
KINDS = ("bytes", "sentence", "language_model")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {**make_families(folder), "sentence": make_tiny_sentence_encoder(folder / "sentence", positions=128)}


def encoder(paths: dict[str, Path], kind: str, **changes: object) -> TextEncoder:
    values = {"kind": kind, "model": "any", "layers": 2, "width": 16, "heads": 4, "max_length": 64, "lora": {"rank": 2}}
    settings = EncoderSettings.model_validate(values | changes)
    torch.manual_seed(0)
    if kind == "bytes":
        return ByteEncoder(settings, LATENT)
    if kind == "sentence":
        return SentenceEncoder(settings, LATENT, paths["sentence"])
    return LanguageModelEncoder(settings, LATENT, tiny_reader(paths, changes.pop("family", "llama")), seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_text_has_the_same_latents_alone_and_beside_a_longer_one(paths, kind, training):
    module = encoder(paths, kind).train(training)
    together = module(TEXTS)
    assert together.shape == (2, 4, 8)
    for row, text in enumerate(TEXTS):
        assert torch.allclose(module([text])[0], together[row], atol=1e-4 if kind == "language_model" else 1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_byte_encoder_equals_a_naive_one_without_padding(paths):
    module = encoder(paths, "bytes").eval()
    ids = torch.tensor(list(TEXTS[0].encode()))
    states = nn.functional.embedding(ids, module.embedding.weight) * 4.0 + sinusoids(len(ids), 16, ids.device)
    for layer in module.layers.layers:
        normed = layer.norm1(states)[None]
        states = states + layer.self_attn(normed, normed, normed, need_weights=False)[0][0]
        states = states + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(states))))
    pooling = module.pooling
    normed = pooling.norm(states)
    pooled = pooling.queries + pooling.attention(pooling.queries, normed, normed, need_weights=False)[0]
    expected = pooling.to_latents(pooled + pooling.mlp(pooled))
    assert torch.allclose(module(TEXTS[:1])[0], expected, atol=1e-5)


def test_pooling_ignores_what_stands_under_the_mask():
    torch.manual_seed(0)
    pooling = LatentPooling(16, 4, LATENT)
    states = torch.randn(1, 5, 16)
    noisy = torch.cat([states, 100 * torch.randn(1, 3, 16)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    assert torch.allclose(pooling(noisy, mask), pooling(states, mask[:, :5]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_does_not_fit_is_refused_and_counted(paths, kind):
    module = encoder(paths, kind, max_length=10)
    with pytest.raises(UserError, match=r"1 of 2 test texts are longer than 10 (bytes|tokens) \(the longest has \d+\)"):
        module.check(["Ada", TEXTS[1]], "test")
    with pytest.raises(UserError, match="nothing is cut"):
        module(["Ada", TEXTS[1]])
    assert module.check(["Ada"], "test").cut == 0
    assert module(["Ada"]).shape == (1, 4, 8)


def test_cutting_must_be_asked_for_and_is_refused_above_its_share(paths, caplog):
    cut = {"max_length": 8, "overlong": "cut_end", "max_cut_share": 0.5}
    module = encoder(paths, "bytes", **cut)
    with caplog.at_level(logging.WARNING):
        fit = module.check(["short", "much too long"], "test")
    assert (fit.texts, fit.cut, fit.longest, fit.limit) == (2, 1, 13, 8)
    assert "1 of 2 test texts are cut to 8 bytes" in caplog.text
    assert torch.equal(module(["much too long"]), module(["much too"]))
    assert torch.equal(
        encoder(paths, "bytes", **cut | {"overlong": "cut_start"})(["much too long"]), module(["too long"])
    )
    with pytest.raises(UserError, match="2 of 2 test texts"):
        module.check(["much too long", "also too long"], "test")
    with pytest.raises(UserError, match="2 of 2 test texts"):
        encoder(paths, "bytes", **cut | {"max_cut_share": 0.99}).check(["much too long", "also too long"], "test")


def test_an_empty_text_has_latents_too(paths):
    for kind in KINDS:
        assert encoder(paths, kind)(["", TEXTS[0]]).isfinite().all()


def test_the_sentence_encoder_is_frozen_without_dropout_and_has_a_limit_of_its_own(paths):
    module = encoder(paths, "sentence").train()
    assert not module.model.training
    assert not any(parameter.requires_grad for parameter in module.model.parameters())
    module(TEXTS).sum().backward()
    assert all(parameter.grad is not None for parameter in module.projection.parameters())
    with pytest.raises(UserError, match=r"encoder.max_length \(129\) is above the 128 tokens"):
        encoder(paths, "sentence", max_length=129)


def test_a_language_model_encoder_takes_no_more_than_the_models_context(paths):
    assert encoder(paths, "language_model", max_length=2044)([TEXTS[0]]).shape == (1, 4, 8)
    with pytest.raises(UserError, match=r"encoder.max_length \(2045\) .* above the 2048 tokens that llama takes"):
        encoder(paths, "language_model", max_length=2045)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_language_model_encoder_shares_the_readers_weights_and_leaves_it_as_it_is(paths, family):
    reader = tiny_reader(paths, family)
    before = reader.model(input_ids=torch.tensor([[1, 2, 3]])).logits
    settings = EncoderSettings(kind="language_model", lora={"rank": 2, "dropout": 0.0}, max_length=64)
    module = LanguageModelEncoder(settings, LATENT, reader, seed=0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    own = {parameter.data_ptr() for parameter in reader.model.parameters()}
    frozen = [parameter for parameter in module.model.parameters() if not parameter.requires_grad]
    assert frozen and all(parameter.data_ptr() in own for parameter in frozen)
    module.train()(TEXTS).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)
    assert torch.equal(reader.model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)
    assert not any(parameter.requires_grad for parameter in reader.parameters())
