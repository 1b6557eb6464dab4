"""Division of one list of records into named, disjoint splits by seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from stillhouse.runtime.errors import UserError

Record = TypeVar("Record")


def split_by_seed(records: Sequence[Record], sizes: Mapping[str, int | None], seed: int) -> dict[str, list[Record]]:
    """Shuffle `records` by `seed` and deal them out; a size of None takes what the others leave, in shuffled order.

    The result depends on the records' order, the seed, the names and the sizes, not on the order of `sizes`.
    Raises `UserError` where there are too few records, and where two splits would share what is left.
    """
    rest = sorted(name for name, size in sizes.items() if size is None)
    if len(rest) > 1:
        raise UserError(f"splits {', '.join(rest)}: only one may take what is left: give the others a size")
    wanted = {name: size for name, size in sorted(sizes.items()) if size is not None}
    needed = sum(wanted.values()) + len(rest)
    if needed > len(records):
        asked = ", ".join(f"{name} {size}" for name, size in {**wanted, **dict.fromkeys(rest, "at least 1")}.items())
        raise UserError(f"splits need {needed} examples ({asked}), but there are {len(records)}: lower the sizes")
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    splits = {}
    for name, size in wanted.items():
        splits[name], shuffled = shuffled[:size], shuffled[size:]
    return splits | dict.fromkeys(rest, shuffled)
