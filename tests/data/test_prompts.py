"""Prompts render as the model's template says, with thinking off, and are never cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import make_tiny_tokenizer, word_problems

from stillhouse.data.exemplars import Shot
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer, render_prompt, within_limit
from stillhouse.data.records import MathProblem
from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.errors import UserError

PROBLEM = MathProblem(**word_problems(1)[0])
SHOTS = [Shot("How many?", "One. #### 1"), Shot("How old?", "Two. #### 2")]
# What Qwen3's template does: an empty closed block when thinking is off, else nothing.
THINKING = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def tokenizer(suffix: str = ""):
    made = make_tiny_tokenizer()
    made.chat_template = made.chat_template.replace("assistant\n' }}", "assistant\n' }}" + suffix)
    return made


def test_a_chat_prompt_alternates_turns_and_ends_where_the_assistant_begins() -> None:
    text = prompt_renderer(tokenizer()).text("Why?", SHOTS)
    turns = "user\nHow many?", "assistant\nOne. #### 1", "user\nHow old?", "assistant\nTwo. #### 2", "user\nWhy?"
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"


def test_a_plain_prompt_asks_and_answers() -> None:
    text = prompt_renderer(tokenizer(), "plain").text("Why?", SHOTS[:1])
    assert text == "Question: How many?\nAnswer: One. #### 1\n\nQuestion: Why?\nAnswer:"


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_question_only_shots_show_no_answer(prompt_format) -> None:
    shots = [Shot("How many?", None), Shot("How old?", None)]
    text = prompt_renderer(tokenizer(), prompt_format).text("Why?", shots)
    expected = {
        "chat": "<|im_start|>user\nHow many?\n\nHow old?\n\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "plain": "Question: How many?\n\nQuestion: How old?\n\nQuestion: Why?\nAnswer:",
    }
    assert text == expected[prompt_format]


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_the_answer_has_the_same_tokens_after_any_prompt_and_ends_the_turn(prompt_format) -> None:
    renderer = prompt_renderer(tokenizer(), prompt_format)
    zero_shot, few_shot = renderer.sequence(PROBLEM), renderer.sequence(PROBLEM, SHOTS)
    assert zero_shot.answer_ids == few_shot.answer_ids
    assert zero_shot.answer_ids[-1] == renderer.tokenizer.eos_token_id
    assert few_shot.prompt_ids == render_prompt(renderer.tokenizer, PROBLEM.question, SHOTS, prompt_format)
    text = renderer.tokenizer.decode(zero_shot.answer_ids[:-1])
    assert text == PROBLEM.answer if prompt_format == "chat" else f" {PROBLEM.answer}"


def test_the_token_that_ends_a_turn_is_the_template_s_own() -> None:
    made = tokenizer()
    made.eos_token = "<|endoftext|>"
    assert prompt_renderer(made, "chat").turn_end == made.convert_tokens_to_ids("<|im_end|>")
    assert prompt_renderer(made, "plain").turn_end == made.convert_tokens_to_ids("<|endoftext|>")


def test_a_beginning_of_sequence_token_comes_once_in_a_plain_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    plain = render_prompt(made, "Why?", [], "plain")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.bos_token_id)]
    )
    assert render_prompt(made, "Why?", [], "plain") == [made.bos_token_id, *plain]


def test_auto_takes_chat_where_there_is_a_template_and_plain_elsewhere() -> None:
    without = tokenizer()
    without.chat_template = None
    assert prompt_renderer(tokenizer()).chat and not prompt_renderer(without).chat


def test_chat_without_a_template_is_refused() -> None:
    without = tokenizer()
    without.chat_template = None
    with pytest.raises(UserError, match="prompt_format is chat but the tokenizer has no chat template"):
        prompt_renderer(without, "chat")


def test_thinking_is_switched_off_in_the_rendered_text() -> None:
    assert prompt_renderer(tokenizer(THINKING)).text("Why?").endswith("assistant\n<think>\n\n</think>\n\n")


def test_an_open_think_block_is_refused() -> None:
    with pytest.raises(UserError, match="ends inside an open <think> block"):
        prompt_renderer(tokenizer("<think>\n"))


def test_a_template_that_ignores_its_thinking_switch_is_refused() -> None:
    with pytest.raises(UserError, match="renders the same prompt with thinking on and off"):
        prompt_renderer(tokenizer("{# enable_thinking #}"))


def test_a_sequence_over_the_limit_is_an_error_that_names_both_lengths() -> None:
    sequences = [Sequence([1] * 5, 2, "short"), Sequence([1] * 9, 2, "long")]
    with pytest.raises(UserError, match="long: the sequence has 9 tokens but max_length is 8"):
        within_limit(sequences, 8, "error")


def test_a_skip_is_counted_and_nothing_is_cut() -> None:
    sequences = [Sequence([1] * 5, 2, "short"), Sequence([1] * 9, 2, "long")]
    kept, report = within_limit(sequences, 8, "skip")
    assert kept == sequences[:1]
    assert report.examples == (("long", 9),) and len(report) == 1


def test_a_saved_tokenizer_renders_as_the_one_in_memory(tiny_model: Path) -> None:
    saved = load_tokenizer(tiny_model)
    assert render_prompt(saved, PROBLEM.question, SHOTS) == render_prompt(tokenizer(), PROBLEM.question, SHOTS)
