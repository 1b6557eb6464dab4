"""Channels: Z is made once and shared out, survives its checkpoint, and no gold answer reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latentwire.tiny_readers import FAMILIES, TEXTS, make_families, tiny_reader
from safetensors.torch import load_file, save_file
from support.tiny_models import make_tiny_sentence_encoder

from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.adapters import root_mean_square
from stillhouse.studies.latentwire.channel import WEIGHTS, Channel
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import RunSettings
from stillhouse.training.checkpoints import save_weights, trained_tensors
from tests.latentwire.tiny_study import run_settings

VARIANTS = {
    "plain": {},
    "private": {"latent": {"length": 5, "private": 1, "dimension": 8}},
    "film": {"adapter": {"film": True}},
    "deep": {"reader": {"precision": "fp32", "deep_prefix": True}},
    "adapted readers": {"reader": {"precision": "fp32", "prefix_tuning": 2, "lora": {"rank": 2}}},
    "language model": {"encoder": {"kind": "language_model", "lora": {"rank": 2}, "model": "gemma", "max_length": 512}},
    "sentence": {"encoder": {"kind": "sentence", "model": "tiny_bert", "width": 16, "heads": 2, "max_length": 128}},
    "gist": {"losses": {"gist": 0.1, "gist_bytes": 8}},
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    paths = make_families(tmp_path_factory.mktemp("families"))
    return {family: tiny_reader(paths, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sentence_encoder(tmp_path_factory.mktemp("encoder") / "tiny_bert", positions=128)


def channel_of(readers: dict[str, Reader], seed: int = 0, **changes: object) -> tuple[Channel, RunSettings]:
    run = run_settings(**changes)
    return Channel.build(run, readers, seed, train_texts=TEXTS), run


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_checkpoint_holds_what_was_trained_and_brings_the_channel_back(readers, sentence_encoder, tmp_path, changes):
    run = run_settings(**changes)
    channel = Channel.build(run, readers, 0, sentence_encoder, TEXTS)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in channel.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_weights(tmp_path, 1, channel, torch.float32, None)
    checkpoint = tmp_path / "checkpoint-1"
    saved = load_file(checkpoint / WEIGHTS)
    assert saved.keys() == trained_tensors(channel).keys()
    assert sum(value.numel() for value in saved.values()) < 60_000
    frozen = ("embed_tokens", "base_layer", "encoder.model.embeddings", "encoder.model.encoder")
    assert not any(part in name for name in saved for part in frozen)

    @torch.no_grad()
    def outputs(of: Channel) -> list[torch.Tensor]:
        latents = of.eval().encode(TEXTS)
        prompts = [of.reader(name).prompt_embeddings(of.prefix(name, latents)) for name in FAMILIES]
        first = [of.reader(name).first_logits(one) for name, one in zip(FAMILIES, prompts, strict=True)]
        return [latents.message(), *first]

    before = outputs(channel)
    loaded = Channel.load(checkpoint, run, readers, sentence_encoder)
    for one, other in zip(before, outputs(loaded), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # other copies lie elsewhere in memory
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(readers, tmp_path):
    channel, run = channel_of(readers)
    save_weights(tmp_path, 1, channel, torch.float32, None)
    with pytest.raises(UserError, match="is of a channel with other settings"):
        Channel.load(tmp_path / "checkpoint-1", run_settings(latent={"length": 4, "dimension": 8}), readers)
    (tmp_path / "checkpoint-1" / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="corrupt"):
        Channel.load(tmp_path / "checkpoint-1", run, readers)


def test_shared_vectors_go_to_all_readers_and_private_ones_to_their_own(readers):
    channel, _ = channel_of(readers, **VARIANTS["private"])
    latents = channel.encode(TEXTS)
    message = latents.message()
    assert message.shape == (2, 5, 8)
    assert torch.equal(latents.of_model("llama"), message[:, [0, 1, 2, 3]])
    assert torch.equal(latents.of_model("gemma"), message[:, [0, 1, 2, 4]])
    received = channel.latents(message)
    assert torch.equal(received.of_model("gemma"), latents.of_model("gemma"))
    for wrong in (message[:, :4], message[..., :7], message[0]):
        with pytest.raises(UserError, match=r"this channel's are \[5, 8\]"):
            channel.latents(wrong)


def test_the_same_seed_builds_the_same_channel_whatever_was_drawn_before(readers):
    first = {name: value.clone() for name, value in trained_tensors(channel_of(readers)[0]).items()}
    torch.rand(3)
    again, other = (trained_tensors(channel_of(readers, seed=seed)[0]) for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_calibration_measures_the_embeddings_that_its_name_says(readers):
    sizes = {}
    for calibration in ("embed_rms", "fixed", "train_stats"):
        channel, _ = channel_of(readers, adapter={"calibration": calibration, "rms": 0.125})
        prefix = channel.prefix("gemma", channel.encode(TEXTS))
        sizes[calibration] = root_mean_square(prefix.embeddings)[0].item()
    gemma = readers["gemma"]
    tokens = [token for text in TEXTS for token in gemma.text_ids(text)]
    assert sizes["fixed"] == pytest.approx(0.125, rel=1e-4)
    assert sizes["embed_rms"] == pytest.approx(gemma.vocabulary_rms, rel=1e-4)
    assert sizes["train_stats"] == pytest.approx(gemma.embed(tokens).square().mean().sqrt().item(), rel=1e-4)


def test_an_encoder_without_its_model_is_refused(readers):
    sentence = {"kind": "sentence", "model": "minilm_l6", "width": 16, "heads": 2}
    with pytest.raises(UserError, match="needs the model directory of 'minilm_l6'"):
        channel_of(readers, encoder=sentence)


def test_a_checkpoint_leaves_frozen_parts_and_what_is_computed_anew_out(tmp_path):
    module = torch.nn.Module()
    module.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    module.trained = torch.nn.Linear(2, 2)
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    module.register_buffer("same_memory", module.computed, persistent=False)
    save_weights(tmp_path, 1, module, torch.float32, None)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == {"trained.weight", "trained.bias", "kept"}
    save_file(saved, tmp_path / "again.safetensors")
