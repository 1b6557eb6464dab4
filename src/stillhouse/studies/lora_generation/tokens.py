"""LoRA weights as a sequence of 2-D tokens, and back.

Each matrix lies with the rank along its rows (A as it is, B transposed) and is cut into blocks of `rows` x `columns`,
block row by block row; what a block lacks at the edges is NaN. Tokens follow the layout's modules, A before B. Each
token is standardised with its own mean and deviation over the adapters that the tokeniser was fitted to, so that
layers and matrices of unlike size weigh alike (Drag-and-Drop, arXiv 2506.16406).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stillhouse.models.lora_tensors import AdapterTensors, LoraLayout
from stillhouse.studies.lora_generation.generator_settings import TokenSettings


@dataclass(frozen=True)
class Piece:
    """One matrix among the tokens: the module and which of its two matrices, its features, its place and blocks."""

    module: str
    matrix: str
    features: int
    first: int
    block_rows: int
    block_columns: int

    @property
    def tokens(self) -> slice:
        """The matrix's places in the sequence."""
        return slice(self.first, self.first + self.block_rows * self.block_columns)


class WeightTokeniser(nn.Module):
    """Adapters of one layout <-> tokens [..., tokens, rows, columns], standardised; fitted before it is used.

    The fit is part of a generator's checkpoint.
    """

    mean: Tensor
    deviation: Tensor
    average: Tensor

    def __init__(self, layout: LoraLayout, settings: TokenSettings) -> None:
        super().__init__()
        self.layout, self.settings = layout, settings
        self.pieces = tuple(_pieces(layout, settings))
        self.tokens = self.pieces[-1].tokens.stop
        self.register_buffer("mean", torch.zeros(self.tokens, 1, 1))
        self.register_buffer("deviation", torch.ones(self.tokens, 1, 1))
        self.register_buffer("average", torch.zeros(self.tokens, settings.rows, settings.columns))

    def fit(self, adapters: Iterable[AdapterTensors]) -> None:
        """Take each token's mean and deviation, and the average of the adapters as tokens, from these adapters."""
        total, squares, count = torch.zeros(1), torch.zeros(1), 0
        for adapter in adapters:
            blocks = self.blocks(adapter).double()
            total, squares, count = total + blocks, squares + blocks.square(), count + 1
        average = total / count
        mean = average.nanmean((-2, -1), keepdim=True)
        variance = (squares / count).nanmean((-2, -1), keepdim=True) - mean.square()
        # A token that never varies, such as a B that was not trained, keeps its size.
        deviation = torch.where(variance > 0, variance.clamp(min=0).sqrt(), 1.0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.average.copy_((average - mean) / deviation)

    def encode(self, adapter: AdapterTensors) -> Tensor:
        """The standardised tokens of an adapter or a batch; differentiable, NaN where a block has no weight."""
        return (self.blocks(adapter) - self.mean) / self.deviation

    def decode(self, tokens: Tensor) -> AdapterTensors:
        """The adapter or batch whose standardised tokens these are; what stands in place of padding is not read."""
        raw = tokens * self.deviation + self.mean
        matrices: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}}
        for piece in self.pieces:
            blocks = raw[..., piece.tokens, :, :].unflatten(-3, (piece.block_rows, piece.block_columns))
            matrix = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
            matrices[piece.matrix][piece.module] = matrix[..., : self.layout.rank, : piece.features]
        b = {module: matrix.mT for module, matrix in matrices["b"].items()}
        return AdapterTensors(matrices["a"], b, self.layout)

    def blocks(self, adapter: AdapterTensors) -> Tensor:
        """The tokens of an adapter or a batch as they are, not standardised."""
        parts = [self.cut(adapter.a[p.module] if p.matrix == "a" else adapter.b[p.module].mT, p) for p in self.pieces]
        return torch.cat(parts, dim=-3)

    def cut(self, matrix: Tensor, piece: Piece) -> Tensor:
        """The blocks [..., blocks, rows, columns] of a matrix [..., rank, features]."""
        rows, columns = self.settings.rows, self.settings.columns
        missing = (
            piece.block_columns * columns - matrix.shape[-1],
            piece.block_rows * rows - matrix.shape[-2],
        )
        whole = pad(matrix, (0, missing[0], 0, missing[1]), value=math.nan)
        return whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).transpose(-3, -2).flatten(-4, -3)


def masked_mean_square(difference: Tensor) -> Tensor:
    """The mean square of each adapter's tokens, [...], over what is not NaN; a NaN gets no gradient."""
    real = ~difference.isnan()
    squares = torch.where(real, difference, 0.0).square()
    return squares.sum((-3, -2, -1)) / real.sum((-3, -2, -1))


def _pieces(layout: LoraLayout, settings: TokenSettings) -> Iterator[Piece]:
    first, block_rows = 0, math.ceil(layout.rank / settings.rows)
    for module in layout.modules:
        for matrix, features in (("a", module.inputs), ("b", module.outputs)):
            piece = Piece(module.name, matrix, features, first, block_rows, math.ceil(features / settings.columns))
            yield piece
            first = piece.tokens.stop
