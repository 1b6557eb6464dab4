"""Instructions through the published quality filter, and calibration rows out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.assets.records import Instruction
from stillhouse.config.quantization import Machine, WeightFormat
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import PromptRenderer, prompt_renderer
from stillhouse.data.records import write_records
from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.studies.quantized_distillation.baselines import calibration_rows
from stillhouse.studies.quantized_distillation.data import filtered, read_instructions
from stillhouse.studies.quantized_distillation.evaluation_settings import (
    GPTQ_COSTS,
    BaselineSettings,
    calibration_objection,
    reasons_not_run,
)

LONG = "apples and coins and books " * 30
EXAMPLES = [
    Instruction("kept", "Say it.", "Ann has 12 apples and buys 7 more of them."),
    Instruction("silent", "Say it.", "  "),
    Instruction("unasked", "", "Ann has apples, many more than Ben has."),
    Instruction("asks long", LONG, "Ann has 12 apples and buys 7 more of them."),
    Instruction("short", "Say it.", "No."),
    Instruction("cut", "Say it.", LONG),
]


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> PromptRenderer:
    return prompt_renderer(load_tokenizer(tiny_model), "plain")


def test_what_the_filter_leaves_out_is_counted_by_reason(renderer: PromptRenderer) -> None:
    found = filtered(EXAMPLES, renderer, max_length=64, response_room=8, limit=None)
    assert [one.example_id for one in found.sequences] == ["kept", "cut"]
    assert found.left_out == {"empty_turn": 2, "long_prompt": 1, "short_response": 1}
    assert found.cut == 1


def test_an_answer_is_cut_to_the_length_and_a_whole_one_ends_its_turn(renderer: PromptRenderer) -> None:
    whole, cut = filtered(EXAMPLES, renderer, 64, 8, None).sequences
    assert whole.input_ids[-1] == renderer.turn_end
    assert len(cut) == 64 and cut.input_ids[-1] != renderer.turn_end
    assert cut.prompt_ids == renderer.prompt_ids("Say it.")


def test_the_limit_counts_what_is_kept(renderer: PromptRenderer) -> None:
    found = filtered([EXAMPLES[1], EXAMPLES[0], EXAMPLES[5]], renderer, 64, 8, limit=1)
    assert [one.example_id for one in found.sequences] == ["kept"]
    assert found.left_out == {"empty_turn": 1}


def test_nothing_left_is_one_line_with_every_reason(tmp_path: Path, renderer: PromptRenderer) -> None:
    path = tmp_path / "train.jsonl"
    write_records(path, EXAMPLES[1:5])
    message = (
        r"train\.jsonl: no example is left after filtering \(2 with an empty turn, 1 with too long a prompt, "
        r"1 with too short a response; max_length 64, response_room 8\): raise max_length"
    )
    with pytest.raises(UserError, match=message):
        read_instructions(path, renderer, 64, 8)


def test_calibration_rows_are_the_examples_one_after_another() -> None:
    examples = [Sequence([1, 2, 3], 1, "a"), Sequence([4, 5, 6, 7], 1, "b")]
    assert calibration_rows(examples, BaselineSettings.model_construct(samples=3, tokens=2)) == [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(UserError, match=r"baselines\.samples: the train split fills 1 .* of 4 tokens, not 2: lower"):
        calibration_rows(examples, BaselineSettings.model_construct(samples=2, tokens=4))


def test_awq_is_refused_without_a_gpu_and_gptq_is_not() -> None:
    none, one = (Machine(capabilities, frozenset()) for capabilities in ((), (9.0,)))
    assert "awq" in str(calibration_objection("awq", none))
    assert calibration_objection("awq", one) is calibration_objection("gptq", none) is None


def test_baselines_round_to_the_students_grid() -> None:
    settings, students = BaselineSettings(), WeightFormat(group_size=64)
    assert settings.weight_format("gptq", students) == students
    assert settings.weight_format("awq", students) == WeightFormat(group_size=64, symmetric=False)
    assert settings.weight_format("gptq", WeightFormat(kind="nf4")) == WeightFormat(group_size=128)


def test_what_was_not_run_has_its_reason() -> None:
    assert reasons_not_run(("teacher", "ptq", "gptq")) == {
        "awq": "not among the conditions; llmcompressor's AWQ needs a GPU"
    }
    assert reasons_not_run(("teacher",))["gptq"].endswith(GPTQ_COSTS)
