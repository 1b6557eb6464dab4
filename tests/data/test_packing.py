"""Packed, padded and separate forward passes are the same; labels come from lengths."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from stillhouse.data.packing import NO_LABEL, Sequence, answer_rows_logits, micro_batches, pack, pad
from stillhouse.models.loading import load_model

COLLATE = {"packed": pack, "packed into rows": partial(pack, row_tokens=17), "padded": pad}


def sequence(length: int, answer_start: int, name: str = "") -> Sequence:
    generator = torch.Generator().manual_seed(length)
    return Sequence(torch.randint(300, (length,), generator=generator).tolist(), answer_start, name or str(length))


# Answers of several lengths, one of a single token, and a prompt of one token.
SEQUENCES = [sequence(7, 3), sequence(12, 11), sequence(5, 1), sequence(9, 4)]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(tiny_model: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(tiny_model, "fp32", attention=request.param)


@pytest.mark.parametrize("collate", COLLATE.values(), ids=COLLATE.keys())
@pytest.mark.parametrize("rows", ["predicting", "with_last"])
def test_rows_equal_those_of_each_sequence_run_alone(model, collate, rows) -> None:
    alone = [model(input_ids=torch.tensor([s.input_ids])).logits[0, list(s.logit_positions(rows))] for s in SEQUENCES]
    together = answer_rows_logits(model, collate(SEQUENCES, rows))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_gradients_of_packed_and_padded_are_equal(tiny_model: Path) -> None:
    gradients = []
    for collate in COLLATE.values():
        model = load_model(tiny_model, "fp32")
        batch = collate(SEQUENCES)
        torch.nn.functional.cross_entropy(answer_rows_logits(model, batch), batch.labels).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for packed, in_rows, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(in_rows, padded, rtol=1e-4, atol=1e-6)


def test_a_later_sequence_cannot_see_an_earlier_one(model: PreTrainedModel) -> None:
    other = Sequence([1] * 7, 3, "other")
    after_first = answer_rows_logits(model, pack([SEQUENCES[0], SEQUENCES[1]]))[-1]
    after_other = answer_rows_logits(model, pack([other, SEQUENCES[1]]))[-1]
    torch.testing.assert_close(after_first, after_other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("collate", COLLATE.values(), ids=COLLATE.keys())
def test_labels_keep_an_answer_token_that_is_also_the_pad_token(collate) -> None:
    batch = collate([Sequence([5, 6, 0], 1, "a"), Sequence([5, 5, 5, 5, 0, 0], 4, "b")])
    assert batch.labels.tolist() == [6, 0, 0, 0]
    assert batch.example_of_row.tolist() == [0, 0, 1, 1]
    assert batch.answer_tokens == 4 and batch.tokens == 9


def test_the_row_after_the_last_token_has_no_label() -> None:
    assert pack([Sequence([5, 6, 7], 1, "a")], "with_last").labels.tolist() == [6, 7, NO_LABEL]


@pytest.mark.parametrize("collate", COLLATE.values(), ids=COLLATE.keys())
def test_only_answer_rows_reach_the_output_embeddings(model: PreTrainedModel, collate) -> None:
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    answer_rows_logits(model, collate(SEQUENCES))
    handle.remove()
    assert seen == [(1, sum(len(s.answer_ids) for s in SEQUENCES), 384)]


def test_packed_rows_are_near_their_limit_and_nearly_filled() -> None:
    batch = pack(SEQUENCES, row_tokens=17)
    assert batch.input_ids.shape == (2, 17)  # 12 + 5 and 9 + 7 of 33 tokens
    assert batch.position_ids.tolist() == [[*range(12), *range(5)], [*range(9), *range(8)]]
    assert pack(SEQUENCES).input_ids.shape == (1, 33)
    # Two rows would be a third empty; a sequence over the limit is no reason for longer rows of the others.
    assert pack([sequence(20, 1), sequence(4, 1), sequence(4, 1)], row_tokens=20).input_ids.shape == (1, 28)
    assert pack([sequence(20, 1), *(sequence(4, 1) for _ in range(5))], row_tokens=4).input_ids.shape == (2, 20)


def test_micro_batches_keep_order_and_budget_and_leave_an_overlong_sequence_alone() -> None:
    sequences = [sequence(length, 1, name) for name, length in enumerate([4, 4, 30, 3, 3, 3, 4])]
    groups = [[len(s) for s in group] for group in micro_batches(sequences, 10)]
    assert groups == [[4, 4], [30], [3, 3, 3], [4]]
    padded = [[len(s) for s in group] for group in micro_batches(sequences, 10, padded=True)]
    assert padded == [[4, 4], [30], [3, 3, 3], [4]]
    assert [len(group) for group in micro_batches([sequence(5, 1), sequence(1 + 1, 1)], 8, padded=True)] == [1, 1]


@pytest.mark.parametrize("answer_start", [0, 3])
def test_a_sequence_needs_a_prompt_and_an_answer(answer_start: int) -> None:
    with pytest.raises(ValueError, match="at least one prompt and one answer token"):
        Sequence([1, 2, 3], answer_start, "a")
