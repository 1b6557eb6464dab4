"""A benchmark refuses forms that differ, takes turns, counts operations, and measures memory apart."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.harness import Aim, Benchmark, Floor, Form, Work, compare, measure, relative_difference
from benchmarks.instruments import by_turns, operations, read_weights
from benchmarks.scale import Scale
from stillhouse.runtime.errors import UserError

# One worker: a server that has imported everything forks the processes that measure memory.
pytestmark = pytest.mark.xdist_group("benchmarks")
SCALE = Scale(rounds=3)


def doubled(factor: float, folder: Path, scale: Scale) -> Work:
    values = torch.ones(4)
    return lambda: {"loss": factor * values.sum(), "gradient": factor * values}


def allocating(factor: int, folder: Path, scale: Scale) -> Work:
    """`documents` times so many MiB."""
    return lambda: {"loss": torch.ones(factor * scale.documents * 2**18).sum() * 0}


def benchmark(*forms: Form) -> Benchmark:
    return Benchmark(
        name="example",
        what="an example",
        forms=forms,
        aims=(Aim("naive", "time", 2),),
        floor=lambda folder, scale: Floor(1e3, 1e3, 4),
        floor_formula="none",
        remains="nothing",
    )


def works(one: Benchmark, folder: Path) -> dict[str, Work]:
    return {form.name: form.prepare(folder, SCALE) for form in one.forms}


def test_a_form_that_computes_something_else_is_refused_by_name(tmp_path: Path) -> None:
    one = benchmark(Form("naive", "naive", partial(doubled, 2.0)), Form("wrong", "ours", partial(doubled, 2.1)))
    with pytest.raises(UserError, match=r"example: 'wrong' differs from 'naive' by 5.0e-02 in \w+, above .* 1e-04"):
        measure(one, SCALE, tmp_path)


def test_nan_and_other_shapes_and_missing_gradients_are_refused(tmp_path: Path) -> None:
    naive = Form("naive", "naive", partial(doubled, 2.0))
    one = benchmark(naive, Form("nan", "ours", partial(doubled, float("nan"))))
    with pytest.raises(UserError, match="differs"):
        compare(one, works(one, tmp_path))
    assert relative_difference(torch.ones(2), torch.ones(3)) == float("inf")
    one = benchmark(naive, Form("short", "ours", lambda folder, scale: lambda: {"loss": torch.ones(())}))
    with pytest.raises(UserError, match=r"'short' gives \['loss'\], 'naive' \['gradient', 'loss'\]"):
        compare(one, works(one, tmp_path))


def test_equal_forms_give_their_difference_and_what_chance_decides_is_left_out(tmp_path: Path) -> None:
    one = benchmark(
        Form("naive", "naive", partial(doubled, 2.0)),
        Form("sampled", "tool", partial(doubled, 9.0), equals=None),
        Form("near", "ours", partial(doubled, 2.00001)),
    )
    assert compare(one, works(one, tmp_path)) == {"near": pytest.approx(5e-6, rel=0.1)}


def test_turns_rotate_and_each_form_gets_one_a_round() -> None:
    order: list[str] = []
    seconds = by_turns({name: partial(order.append, name) for name in "abc"}, 3)
    assert order == list("abcbcacab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_end_with_the_time_but_not_before_the_third() -> None:
    assert len(by_turns({"a": partial(time.sleep, 0.01)}, 9, within=0)["a"]) == 3
    assert len(by_turns({"a": partial(time.sleep, 0.01)}, 4, within=60)["a"]) == 4


def test_operations_are_those_of_the_formulas_attention_included() -> None:
    left, right = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4)
    assert operations(lambda: left @ right) == 2 * 8 * 16 * 4
    assert operations(lambda: (left @ right).sum().backward()) == 2 * 2 * 8 * 16 * 4  # `right` needs no gradient
    query = torch.randn(1, 2, 10, 8, requires_grad=True)
    attention = partial(functional.scaled_dot_product_attention, query, query.detach(), query.detach())
    assert operations(attention) == 2 * (2 * 2 * 10 * 10 * 8)
    assert operations(lambda: attention().sum().backward()) > 2 * 2 * (2 * 2 * 10 * 10 * 8)


def test_a_scale_s_forward_pass_is_what_its_model_does(tmp_path: Path) -> None:
    """The floors stand on this formula; the mask's causal half is theirs, the counter sees whole squares."""
    from benchmarks.scale import model_directory
    from stillhouse.models.loading import load_model

    scale = Scale(layers=2, width=64, vocabulary=512, head_size=16)
    model = load_model(model_directory(tmp_path, scale), "fp32")
    counted = operations(lambda: model(input_ids=torch.zeros(1, 12, dtype=torch.long), use_cache=False))
    assert counted == pytest.approx(scale.operations(tokens=12, pairs=12 * 12, rows=12), rel=1e-3)  # and rotations


def test_weights_are_read_in_of_models_that_have_empty_ones_too() -> None:
    module = torch.nn.ParameterList([torch.zeros(0), torch.ones(3)])
    read_weights()
    assert [parameter.numel() for parameter in module] == [0, 3]


@pytest.mark.slow
def test_memory_is_that_of_the_form_alone(tmp_path: Path) -> None:
    one = benchmark(Form("naive", "naive", partial(allocating, 3)), Form("ours", "ours", partial(allocating, 1)))
    result = measure(one, replace(SCALE, rounds=1, documents=100), tmp_path)
    naive, ours = (result.form(name).peak_memory_mib or 0 for name in ("naive", "ours"))
    assert 290 < naive < 340 and 90 < ours < 140
