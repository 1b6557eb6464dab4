"""Division of one list of records into named, disjoint splits by seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from stillhouse.runtime.errors import UserError

Record = TypeVar("Record")


def split_by_seed(
    records: Sequence[Record],
    sizes: Mapping[str, int | None],
    seed: int,
    group: Callable[[Record], Hashable] | None = None,
) -> dict[str, list[Record]]:
    """Shuffle `records` by `seed` and deal them out; a size of None takes what the others leave, in shuffled order.

    With `group`, records of one group stay in one split: a split takes whole groups until it has its size, and gives
    up what its last group has too many. The result depends on the records' order, the seed, the names and the sizes,
    not on the order of `sizes`.

    Raises `UserError` where there are too few records, and where two splits would share what is left.
    """
    rest = sorted(name for name, size in sizes.items() if size is None)
    if len(rest) > 1:
        raise UserError(f"splits {', '.join(rest)}: only one may take what is left: give the others a size")
    wanted = {name: size for name, size in sorted(sizes.items()) if size is not None}
    shuffled = _shuffled_groups(records, seed, group)
    splits: dict[str, list[Record]] = {}
    for name, size in wanted.items():
        splits[name] = []
        while len(splits[name]) < size and (members := next(shuffled, None)):
            splits[name] += members
    left = [record for members in shuffled for record in members]
    if any(len(splits[name]) < size for name, size in wanted.items()) or (rest and not left):
        asked = ", ".join(f"{name} {size}" for name, size in {**wanted, **dict.fromkeys(rest, "at least 1")}.items())
        whole = " in whole groups" if group else ""
        raise UserError(
            f"splits need {sum(wanted.values()) + len(rest)} examples ({asked}){whole}, but there are {len(records)}: "
            "lower the sizes"
        )
    return {name: splits[name][:size] for name, size in wanted.items()} | dict.fromkeys(rest, left)


def _shuffled_groups(
    records: Sequence[Record], seed: int, group: Callable[[Record], Hashable] | None
) -> Iterator[list[Record]]:
    """The groups in an order drawn by `seed`, each record a group of its own where there is no `group`."""
    if group is None:
        order = list(records)
        random.Random(seed).shuffle(order)
        return ([record] for record in order)
    members: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        members[group(record)].append(record)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    return iter(groups)
