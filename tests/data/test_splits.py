"""Splits by seed are disjoint, reproducible, and refuse to be larger than the data."""

from __future__ import annotations

import pytest

from stillhouse.data.splits import split_by_seed
from stillhouse.runtime.errors import UserError

RECORDS = list(range(20))


def test_splits_are_disjoint_and_what_is_left_is_kept() -> None:
    splits = split_by_seed(RECORDS, {"train": 8, "validation": 4, "test": None}, seed=42)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 4, "test": 8}
    assert sorted(record for split in splits.values() for record in split) == RECORDS


def test_the_same_seed_gives_the_same_splits_whatever_the_order_of_names() -> None:
    forward = split_by_seed(RECORDS, {"train": 8, "test": 4}, seed=1)
    assert forward == split_by_seed(RECORDS, {"test": 4, "train": 8}, seed=1)
    assert forward != split_by_seed(RECORDS, {"train": 8, "test": 4}, seed=2)


def test_the_split_of_a_seed_never_changes() -> None:
    assert split_by_seed(RECORDS, {"a": 3, "b": None}, seed=42)["a"] == [19, 5, 14]


def test_too_few_records_are_refused_with_all_numbers() -> None:
    with pytest.raises(UserError, match=r"splits need 22 examples \(train 16, validation 5, test at least 1\).* 20"):
        split_by_seed(RECORDS, {"test": None, "train": 16, "validation": 5}, seed=0)


def test_only_one_split_takes_what_is_left() -> None:
    with pytest.raises(UserError, match="splits a, b: only one may take what is left"):
        split_by_seed(RECORDS, {"a": None, "b": None}, seed=0)


def test_records_of_one_group_stay_in_one_split() -> None:
    splits = split_by_seed(RECORDS, {"train": 7, "test": None}, seed=0, group=lambda record: record // 4)
    groups = {name: {record // 4 for record in split} for name, split in splits.items()}
    assert len(splits["train"]) == 7
    assert groups["train"].isdisjoint(groups["test"])
    assert len(groups["train"]) == 2


def test_whole_groups_that_do_not_suffice_are_refused() -> None:
    with pytest.raises(UserError, match=r"splits need 18 examples .* in whole groups, but there are 20"):
        split_by_seed(RECORDS, {"train": 17, "test": None}, seed=0, group=lambda record: record // 5)
