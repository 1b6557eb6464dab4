"""The order in which a parallel run starts its tests, and which of them share a worker.

The tests of an `xdist_group` do, and those of one file, so that what they share is made once. A long group that starts
late would leave the other workers with nothing to do. Slurm's is the first: it mostly waits.
"""

from __future__ import annotations

from collections import Counter

import pytest

SLOW = 10


def groups_first(items: list[pytest.Item]) -> None:
    """Slurm's tests, then the groups, the largest first, then the files; a slow test counts as ten."""
    named = {item: group_of(item) for item in items}
    for item, group in named.items():
        if not group:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    sizes: Counter[str] = Counter()
    for item in items:
        sizes[group_of(item)] += SLOW if item.get_closest_marker("slow") else 1

    def rank(item: pytest.Item) -> tuple[bool, bool, int, str]:
        group = group_of(item)
        return group != "slurm", not named[item], -sizes[group], group

    items.sort(key=rank)


def group_of(item: pytest.Item) -> str:
    """The name of the group that an item belongs to, or nothing."""
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else ""
