"""Weights come back from tokens as they were, whatever shape they have, and tokens weigh alike."""

from __future__ import annotations

import pytest
import torch

from stillhouse.models.lora_tensors import stacked
from stillhouse.studies.lora_generation.generator_settings import TokenSettings
from stillhouse.studies.lora_generation.tokens import WeightTokeniser, masked_mean_square
from tests.lora_generation.adapters import largest_difference, random_adapter, small_layout

SHAPES = [(2, 5), (3, 4), (1, 20), (10, 130)]


def tokeniser(rows: int = 2, columns: int = 5) -> WeightTokeniser:
    made = WeightTokeniser(small_layout(), TokenSettings(rows=rows, columns=columns))
    made.fit(random_adapter(made.layout, seed, size=0.02) for seed in range(4))
    return made


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_an_adapter_comes_back_from_its_tokens(rows: int, columns: int) -> None:
    tokens = tokeniser(rows, columns)
    adapter = random_adapter(tokens.layout, 9, size=0.02)
    encoded = tokens.encode(adapter)
    assert encoded.shape == (tokens.tokens, rows, columns)
    assert largest_difference(tokens.decode(encoded), adapter) < 1e-6 * 0.02
    batch = stacked([adapter, random_adapter(tokens.layout, 10)])
    assert largest_difference(tokens.decode(tokens.encode(batch)), batch) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_weight_stands_in_one_token_and_the_rest_is_nan(rows: int, columns: int) -> None:
    tokens = tokeniser(rows, columns)
    encoded = tokens.encode(random_adapter(tokens.layout, 9))
    assert int((~encoded.isnan()).sum()) == tokens.layout.values
    assert largest_difference(tokens.decode(encoded.nan_to_num(1e9)), random_adapter(tokens.layout, 9)) < 1e-5


def test_a_block_is_where_the_naive_cut_puts_it() -> None:
    tokens = tokeniser(2, 5)
    adapter = random_adapter(tokens.layout, 9)
    blocks = tokens.blocks(adapter)
    name = tokens.layout.modules[0].name
    torch.testing.assert_close(blocks[1], adapter.a[name][0:2, 5:10])
    torch.testing.assert_close(blocks[4 + 3][:1], adapter.a[name][2:3, 15:20])
    assert blocks[4][1].isnan().all()
    [b] = [piece for piece in tokens.pieces if piece.module == name and piece.matrix == "b"]
    torch.testing.assert_close(blocks[b.first], adapter.b[name][0:5, 0:2].T)


def test_each_token_has_mean_zero_and_deviation_one_over_the_adapters() -> None:
    tokens = tokeniser()
    encoded = torch.stack([tokens.encode(random_adapter(tokens.layout, seed, size=0.02)) for seed in range(4)])
    for token in range(tokens.tokens):
        values = encoded[:, token][~encoded[:, token].isnan()]
        assert abs(values.mean()) < 1e-5
        assert values.std(correction=0) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(tokens.average, encoded.mean(0), equal_nan=True, atol=1e-5, rtol=0)


def test_a_token_without_variation_keeps_its_size() -> None:
    tokens = WeightTokeniser(small_layout(), TokenSettings(rows=3, columns=20))
    adapter = random_adapter(tokens.layout, 1).map(torch.zeros_like)
    tokens.fit([adapter, adapter])
    other = random_adapter(tokens.layout, 2)
    assert torch.isfinite(tokens.decode(tokens.encode(other)).a[tokens.layout.modules[0].name]).all()
    assert largest_difference(tokens.decode(tokens.encode(other)), other) == 0


def test_padding_takes_no_part_in_a_mean_square_nor_in_its_gradient() -> None:
    tokens = tokeniser(2, 7)
    learnt = random_adapter(tokens.layout, 3).map(lambda tensor: tensor.requires_grad_())
    target = random_adapter(tokens.layout, 4)
    difference = tokens.encode(learnt) - tokens.encode(target)
    assert difference.isnan().any()
    loss = masked_mean_square(difference)
    assert loss.detach().item() == pytest.approx(
        float(difference.detach()[~difference.isnan()].square().mean()), rel=1e-5
    )
    loss.backward()
    assert all(torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0 for tensor in learnt.a.values())
