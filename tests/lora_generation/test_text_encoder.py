"""Prompt embeddings: mean pooling, token states, what is cut, and what the cache is keyed by."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from stillhouse.models.sentence_encoder import load_sentence_encoder
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation import text_encoder
from stillhouse.studies.lora_generation.generator_settings import TextSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from tests.lora_generation.conftest import TinyStudy

PROMPTS = ["Where does the river end?", "How many?", "What is 3 plus 4, and what is 5 plus 6?"]


@torch.no_grad()
def states_of(path: Path, prompt: str) -> torch.Tensor:
    model, tokenizer = load_sentence_encoder(path)
    return model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]


def test_a_sentence_is_the_mean_of_its_tokens_states(tiny_study: TinyStudy, tmp_path: Path) -> None:
    embedded = PromptEncoder(tiny_study.encoder, TextSettings(batch_size=2), tmp_path).embed(PROMPTS)
    assert embedded.shape == (3, 1, 16)
    for prompt, vector in zip(PROMPTS, embedded, strict=True):
        torch.testing.assert_close(vector[0], states_of(tiny_study.encoder, prompt).mean(0), atol=1e-5, rtol=1e-5)


def test_token_states_are_followed_by_zeros_and_cut_at_their_length(
    tiny_study: TinyStudy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TextSettings(states="tokens", length=5)
    with caplog.at_level(logging.WARNING):
        embedded = PromptEncoder(tiny_study.encoder, settings, tmp_path).embed(PROMPTS)
    assert embedded.shape == (3, 5, 16)
    short = states_of(tiny_study.encoder, PROMPTS[1])
    torch.testing.assert_close(embedded[1, : len(short)], short, atol=1e-5, rtol=1e-5)
    assert len(short) < 5
    assert embedded[1, len(short) :].abs().max() == 0
    assert "2 of 3 prompts are longer than 5 tokens" in caplog.text


def test_a_cached_prompt_needs_no_encoder_and_other_settings_are_kept_apart(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PromptEncoder(tiny_study.encoder, TextSettings(), tmp_path).embed(PROMPTS)
    with monkeypatch.context() as patch:
        patch.delattr(text_encoder, "load_sentence_encoder")
        assert torch.equal(
            PromptEncoder(tiny_study.encoder, TextSettings(batch_size=1), tmp_path).embed(PROMPTS), first
        )
    tokens = PromptEncoder(tiny_study.encoder, TextSettings(states="tokens", length=1), tmp_path).embed(PROMPTS)
    assert not torch.equal(tokens, first)


def test_no_prompts_at_all_is_an_error(tiny_study: TinyStudy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are none to read"):
        PromptEncoder(tiny_study.encoder, TextSettings(), tmp_path).embed([])
