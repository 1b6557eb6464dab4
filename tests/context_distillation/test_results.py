"""What evaluation leaves behind: headline checkpoints are chosen by the split that the setting names."""

from __future__ import annotations

import pandas as pd
import pytest

from stillhouse.studies.context_distillation.results import ITEM_COLUMNS, measure, select_checkpoints

# By split and step: NLL of every item, and whether every answer is right. Validation and test disagree.
TRUTH = {
    ("validation", 2): (1.0, False),
    ("validation", 4): (1.5, True),
    ("validation", 6): (2.0, False),
    ("test", 2): (2.0, False),
    ("test", 4): (1.5, False),
    ("test", 6): (1.0, True),
}


@pytest.mark.parametrize(("rule", "step"), [("gold_nll", 2), ("strict_accuracy", 4), ("last", 6), ("best_on_test", 6)])
def test_a_checkpoint_is_chosen_by_the_rule_and_never_on_test_unless_it_says_so(rule: str, step: int) -> None:
    rows = [
        {
            "condition": "online_v1",
            "seed": 42,
            "step": at,
            "shots": 0,
            "split": split,
            "item_id": f"{split}/{item}",
            "gold_nll": 10 * nll,
            "gold_tokens": 10,
            "output": "#### 7",
            "output_tokens": 4,
            "finished": True,
            "strict_correct": right,
            "flexible_correct": right,
            "wrote_marker": True,
        }
        for (split, at), (nll, right) in TRUTH.items()
        for item in range(5)
    ]
    items = pd.DataFrame(rows)
    assert set(items.columns) == ITEM_COLUMNS.keys() - {"model"}
    [chosen] = select_checkpoints(measure(items), rule)
    assert (chosen.condition, chosen.seed, chosen.step) == ("online_v1", 42, step)
