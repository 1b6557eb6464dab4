"""Distances from the teacher against the plain computation on whole logits, and texts against the harness's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from support.tiny_models import make_tiny_llama

from stillhouse.data.packing import Sequence
from stillhouse.evaluation import teacher_agreement
from stillhouse.evaluation.perplexity import answer_nll, sliding_windows, text_tokens
from stillhouse.evaluation.teacher_agreement import teacher_states, token_scores
from stillhouse.models.loading import load_model, load_tokenizer
from stillhouse.models.output_head import output_head

TEXT = ["Ann has 12 apples and buys 7 more.", "How many apples has Ann? She has 19 apples."]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("other") / "model", seed=1)


def test_kl_and_agreement_equal_those_of_whole_logits(
    tiny_model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_agreement, "ROWS_AT_ONCE", 3)
    teacher, student = load_model(tiny_model, "fp32"), load_model(other_model, "fp32")
    generator = torch.Generator().manual_seed(0)
    sequences = [
        Sequence(torch.randint(3, 300, (length,), generator=generator).tolist(), start, f"s{length}")
        for length, start in ((9, 1), (17, 12), (6, 3))
    ]
    states = teacher_states(teacher, sequences, batch_tokens=20)
    scores = token_scores(student, sequences, states, output_head(teacher), batch_tokens=20)
    for sequence, score in zip(sequences, scores, strict=True):
        with torch.no_grad():
            ids = torch.tensor([sequence.input_ids])
            ours, theirs = (
                model(input_ids=ids).logits[0, sequence.answer_start - 1 : -1].log_softmax(-1)
                for model in (student, teacher)
            )
        labels = torch.tensor(sequence.answer_ids)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        torch.testing.assert_close(score.nll, -ours.gather(1, labels[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score.kl, kl, rtol=1e-4, atol=1e-4)
        assert score.agrees.tolist() == (ours.argmax(-1) == theirs.argmax(-1)).float().tolist()


def test_a_model_does_not_differ_from_itself(tiny_model: Path) -> None:
    model = load_model(tiny_model, "fp32")
    sequences = [Sequence([5, 6, 7, 8], 1, "a")]
    [score] = token_scores(model, sequences, teacher_states(model, sequences, 64), output_head(model), 64)
    assert score.kl.abs().max() < 1e-5 and score.agrees.min() == 1


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(50, 16, 8), (16, 16, 8), (17, 16, 16), (40, 16, 3), (2, 8, 4)]
)
def test_windows_score_each_token_but_the_first_once(length: int, window: int, stride: int) -> None:
    ids = list(range(100, 100 + length))
    windows = sliding_windows(ids, window, stride)
    assert [token for one in windows for token in one.answer_ids] == ids[1:]
    assert all(len(one) <= window for one in windows)
    assert all(len(one.prompt_ids) >= window - stride for one in windows[1:])
    assert len({one.example_id for one in windows}) == len(windows)


def test_a_text_of_one_token_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="needs two tokens"):
        sliding_windows([1], 8, 4)


def test_windows_have_the_likelihood_that_the_harness_finds(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "fp32"), load_tokenizer(tiny_model)
    windows = sliding_windows(text_tokens(tokenizer, TEXT * 3), 24, 10)
    # Its cache of logits takes windows of equal tokens for one, wherever their answers begin; this text repeats itself.
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, logits_cache=False)
    requests = [(("", ""), one.prompt_ids, one.answer_ids) for one in windows]
    found = [-likelihood for likelihood, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert [one.sum_nats for one in answer_nll(model, windows)] == pytest.approx(found, abs=1e-3)


def test_one_window_after_the_beginning_token_is_the_harness_rolling_likelihood(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "fp32"), load_tokenizer(tiny_model)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    text = "\n\n".join(TEXT)

    class Request:
        args = (text,)

    [rolling] = harness.loglikelihood_rolling([Request()], disable_tqdm=True)
    ids = [harness.prefix_token_id, *text_tokens(tokenizer, TEXT)]
    [found] = answer_nll(model, sliding_windows(ids, 1024, 512))
    assert -found.sum_nats == pytest.approx(rolling, abs=1e-3)
    assert math.exp(found.sum_nats / found.tokens) > 1


def test_a_text_is_cut_after_its_first_tokens(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    whole = text_tokens(tokenizer, TEXT)
    assert tokenizer.decode(whole) == "\n\n".join(TEXT)
    assert text_tokens(tokenizer, TEXT, 5) == whole[:5]
