"""The order in which a parallel run starts its tests; the tests of an `xdist_group` share one worker.

A long group that starts late would leave the other workers with nothing to do. Slurm's is the first: it mostly waits.
"""

from __future__ import annotations

from collections import Counter

import pytest


def groups_first(items: list[pytest.Item]) -> None:
    """Slurm's tests, then the groups, the largest first, then all others as they were."""
    sizes = Counter(map(group_of, items))

    def rank(item: pytest.Item) -> tuple[bool, int, str]:
        group = group_of(item)
        return group != "slurm", -sizes[group] if group else 0, group

    items.sort(key=rank)


def group_of(item: pytest.Item) -> str:
    """The name of the group that an item belongs to, or nothing."""
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else ""
