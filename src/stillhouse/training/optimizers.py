"""AdamW over named parameter groups: a learning-rate factor per module, no decay of norms and biases."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stillhouse.runtime.errors import UserError

BASE_GROUP = "base"


@dataclass(frozen=True)
class ParameterGroup:
    """Trained parameters, by name, that share a learning-rate factor.

    schedule: a further factor for each update, counted from 1; None where the group is frozen in it: then it gets
    neither a gradient nor an update, as if it were not there. Without a schedule the factor is 1.

    Parameters that come frozen, without requiring a gradient, are lent: they may lie in the memory of weights that
    others use. Before the first update of their group they get memory of their own.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    multiplier: float = 1.0
    schedule: Callable[[int], float | None] | None = None


def parameter_groups(model: nn.Module, multipliers: Mapping[str, float]) -> list[ParameterGroup]:
    """Split the trained parameters of `model` by the module names in `multipliers`; the rest is the group
    `base`.

    A name is one or more whole components of the dotted path (`embed_tokens`, `layers.0`), never a part of
    one. Of several that match, the one that ends deepest wins, then the longest.
    Raises `UserError` for a name that matches no trained parameter.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError("nothing to train: every parameter of the model is frozen")
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in (BASE_GROUP, *multipliers)}
    for name, parameter in trained.items():
        matches = [(end, len(key), key) for key in multipliers if (end := _match_end(name, key))]
        members[max(matches)[2] if matches else BASE_GROUP][name] = parameter
    for key in multipliers:
        if not any(_match_end(name, key) for name in trained):
            known = sorted({part for name in trained for part in name.split(".") if not part.isdigit()})
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise UserError(f"learning_rate_multipliers: no trained module is named '{key}'; nearest: '{nearest}'")
    return [
        ParameterGroup(name, parameters, multipliers.get(name, 1.0))
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(groups: Sequence[ParameterGroup], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with PyTorch's betas, fused; vectors (norms and biases) are not decayed."""
    optimizer_groups = []
    for group in groups:
        for decayed in (True, False):
            parameters = [value for value in group.parameters.values() if (value.ndim >= 2) is decayed]
            if parameters:
                optimizer_groups.append(
                    {
                        "params": parameters,
                        "name": group.name,
                        "multiplier": group.multiplier,
                        "schedule": group.schedule,
                        "weight_decay": weight_decay if decayed else 0.0,
                    }
                )
    return torch.optim.AdamW(optimizer_groups, lr=learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, step: int) -> dict[str, float]:
    """Set each group's rate for update `step` to `learning_rate` times its factors; returns the rates by group name.

    Parameters of a group that is frozen in this update do not require a gradient, the others do. One that never did
    is given memory of its own first.
    """
    for group in optimizer.param_groups:
        factor = group["schedule"](step) if group["schedule"] else 1.0
        group["lr"] = learning_rate * group["multiplier"] * (factor or 0.0)
        for parameter in group["params"]:
            if factor is not None and not parameter.requires_grad and not optimizer.state.get(parameter):
                parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(factor is not None)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def trained_parameters(groups: Iterable[ParameterGroup]) -> dict[str, nn.Parameter]:
    """All parameters of the groups, by name."""
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


def _match_end(path: str, key: str) -> int:
    """Where the components of `key` last end among those of `path`, counted from 1; 0: nowhere."""
    components, wanted = path.split("."), key.split(".")
    ends = range(len(components), len(wanted) - 1, -1)
    return next((end for end in ends if components[end - len(wanted) : end] == wanted), 0)
