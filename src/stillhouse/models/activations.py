"""The residual stream of a causal language model: reading it at a layer, and putting other values in its place.

Layer 0 is what the first block reads, layer l in 1..n what block l leaves; both before the final norm. Blocks may
return a tensor or a tuple that begins with it. Nothing is written in place: the tensors of a pass may be in use
elsewhere, and gradients flow into what is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.runtime.errors import UserError


class _LayerReachedError(Exception):
    """Ends a forward pass of which only the first layers are wanted."""


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks, in order. Raises `UserError` for an architecture without such a list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise UserError(f"{type(model).__name__}: has no list of {count} blocks: its residual stream cannot be read")
    return lists[0]


def check_layer(model: PreTrainedModel, layer: int, key: str = "layer") -> None:
    """Raise `UserError`, naming the setting `key`, for a layer that the model does not have."""
    count = len(blocks(model))
    if not 0 <= layer <= count:
        raise UserError(f"{key}: {layer} is out of range: the model has layers 0 (embeddings) to {count}")


def residual_stream(model: PreTrainedModel, layer: int, **inputs: Any) -> Tensor:
    """The residual stream [batch, tokens, hidden] at `layer`; the blocks after it, and the lm_head, do not run."""
    found: list[Tensor] = []

    def stop(hidden: Tensor) -> Tensor:
        found.append(hidden)
        raise _LayerReachedError

    with _edited(model, layer, stop):
        try:
            model.base_model(**inputs)
        except _LayerReachedError:
            return found[0]
    raise AssertionError("the forward pass did not run the model's blocks")


@contextmanager
def captured(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """Within the context every forward pass appends its residual stream [batch, tokens, hidden] at `layer`."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    with _edited(model, layer, keep):
        yield found


@contextmanager
def swapped(model: PreTrainedModel, layer: int, columns: Tensor, activations: Tensor) -> Iterator[None]:
    """Within the context the residual stream at `layer` is `activations` [batch, hidden] in column `columns` [batch].

    Row i of a forward pass gets activations[i] in columns[i]. A tuple keeps its other members.
    """

    def put(hidden: Tensor) -> Tensor:
        rows = torch.arange(len(columns), device=hidden.device)
        return hidden.index_put((rows, columns.to(hidden.device)), activations.to(hidden))

    with _edited(model, layer, put):
        yield


@contextmanager
def _edited(model: PreTrainedModel, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the residual stream at `layer` passes through `edit`."""

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if arguments:
            return (edit(arguments[0]), *arguments[1:]), named
        return arguments, named | {"hidden_states": edit(named["hidden_states"])}

    def after(module: nn.Module, arguments: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    check_layer(model, layer)
    handle = (
        blocks(model)[0].register_forward_pre_hook(before, with_kwargs=True)
        if layer == 0
        else blocks(model)[layer - 1].register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()
