"""The two decoders: from prompt embeddings [batch, prompts, vectors, width] to standardised weight tokens.

Both give tokens [batch, tokens, rows, columns]. No pattern is repeated over a matrix, so that any one adapter can be
met; a test has the error. Many at once are another matter: layers share the compact decoder's heads, so that all its
matrices of one kind span `width` + 1 dimensions at most, and the tokens of a cascade share their kernels. What stands
in place of padding means nothing.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from stillhouse.studies.lora_generation.generator_settings import GeneratorSettings
from stillhouse.studies.lora_generation.tokens import Piece, WeightTokeniser


class CompactDecoder(nn.Module):
    """One summary of all prompts, a learned embedding per matrix, residual blocks, and a head per kind of matrix.

    A kind is a target module's A or B; its head is shared by all layers.
    """

    def __init__(self, settings: GeneratorSettings, tokeniser: WeightTokeniser, condition_width: int) -> None:
        super().__init__()
        width, rank = settings.width, tokeniser.layout.rank
        self.cut, self.pieces = tokeniser.cut, tokeniser.pieces
        self.read = nn.Sequential(nn.LayerNorm(condition_width), nn.Linear(condition_width, width), nn.GELU())
        self.summarise = nn.Linear(width, width)
        self.matrices = nn.Parameter(torch.randn(len(self.pieces), width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.places: dict[str, list[int]] = defaultdict(list)
        for place, piece in enumerate(self.pieces):
            self.places[_kind(piece)].append(place)
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(width, rank * self.pieces[places[0]].features) for kind, places in self.places.items()}
        )
        _begin_small(self.heads)

    def forward(self, conditions: Tensor) -> Tensor:
        """Tokens [batch, tokens, rows, columns]."""
        summary = self.summarise(self.read(conditions).mean((1, 2)))
        states = summary[:, None] + self.matrices
        for block in self.blocks:
            states = states + block(states)
        states = self.norm(states)
        cut: dict[int, Tensor] = {}
        for kind, places in self.places.items():
            values = self.heads[kind](states[:, places])
            for number, place in enumerate(places):
                piece = self.pieces[place]
                cut[place] = self.cut(values[:, number].unflatten(-1, (-1, piece.features)), piece)
        return torch.cat([cut[place] for place in range(len(self.pieces))], dim=1)


class HyperConvolutionDecoder(nn.Module):
    """Drag-and-Drop's cascade (arXiv 2506.16406): prompts x vectors x width become tokens x rows x columns."""

    def __init__(
        self, settings: GeneratorSettings, tokeniser: WeightTokeniser, condition_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        grid = (tokeniser.tokens, tokeniser.settings.rows, tokeniser.settings.columns)
        shapes = [condition_shape, *((s.tokens, s.rows, s.columns) for s in settings.stages), grid]
        stages = [HyperConvolution(before, after, settings.kernel) for before, after in pairwise(shapes)]
        self.stages = nn.Sequential(*stages)
        _begin_small(stages[-1].tokens)

    def forward(self, conditions: Tensor) -> Tensor:
        """Tokens [batch, tokens, rows, columns]."""
        tokens: Tensor = self.stages(conditions)
        return tokens


class HyperConvolution(nn.Module):
    """One stage: each of three axes in turn is the channels of a convolution over the other two.

    Rows and columns go in both orders, averaged; a learned plane is added; the sequence of tokens goes last.
    """

    def __init__(self, before: tuple[int, int, int], after: tuple[int, int, int], kernel: int) -> None:
        super().__init__()

        def convolution(axis: int) -> nn.Conv2d:
            return nn.Conv2d(before[axis], after[axis], kernel, padding="same", bias=False)

        self.norm = nn.LayerNorm(before[1:])
        self.rows = nn.ModuleList([convolution(1), convolution(1)])
        self.columns = nn.ModuleList([convolution(2), convolution(2)])
        self.plane = nn.Parameter(torch.randn(after[1:]) / 10)
        self.tokens = nn.Conv2d(before[0], after[0], kernel, padding="same")

    def forward(self, grid: Tensor) -> Tensor:
        """The grid [batch, tokens, rows, columns] of the next stage."""
        grid = self.norm(grid)
        columns_first = _over(self.rows[0], _over(self.columns[0], grid, 3), 2)
        rows_first = _over(self.columns[1], _over(self.rows[1], grid, 2), 3)
        return _over(self.tokens, gelu((columns_first + rows_first) / 2 + self.plane), 1)


def _over(convolution: nn.Module, grid: Tensor, axis: int) -> Tensor:
    """The convolution with `axis` of the grid as its channels."""
    moved: Tensor = convolution(grid.movedim(axis, 1))
    return moved.movedim(1, axis)


def _begin_small(last: nn.Module) -> None:
    """Scale down the last layer: a generator begins near its start."""
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(0.1)


def _kind(piece: Piece) -> str:
    """A name for matrices that share a head: their target module, side and size."""
    return f"{piece.module.rpartition('.')[2]}_{piece.matrix}_{piece.features}"
