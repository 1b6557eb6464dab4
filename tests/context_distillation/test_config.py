"""The study's settings: every condition is the method with one thing changed, and published mistakes are known."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.studies.context_distillation.config import CONDITIONS, ContextDistillationConfig
from stillhouse.studies.context_distillation.run_settings import RunSettings

# What the study says of each condition: the settings in which it differs from online_v1, and nothing else does.
CHANGES: dict[str, dict[str, Any]] = {
    "online_v1": {},
    "baseline": {"distillation.loss": "none"},
    "fewshot_teacher": {"seed_offset": 1000, "teacher.context.seed": 1042},
    "zeroshot_teacher": {"teacher.context.shots": 0},
    "shuffled_answers": {"teacher.context.exemplars": "shuffled_answers"},
    "question_only_shots": {"teacher.context.exemplars": "question_only"},
    "wrong_exemplars": {"teacher.context.exemplars": "wrong_answers"},
    "kl_t1": {"distillation.loss": "kl"},
    "kl_t2": {"distillation.loss": "kl", "distillation.temperature": 2.0},
    "kl_t4": {"distillation.loss": "kl", "distillation.temperature": 4.0},
    "random_k": {"distillation.loss": "mse_random_k"},
    "lora_teacher": {"teacher.adapter": True, "teacher.context.shots": 0},
}


def leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_every_condition_is_in_the_table() -> None:
    assert CHANGES.keys() == CONDITIONS.keys()


@pytest.mark.parametrize("condition", CHANGES)
def test_a_condition_is_the_method_with_one_thing_changed(condition: str) -> None:
    study = ContextDistillationConfig(conditions=(condition,))
    method = leaves(RunSettings().model_dump())
    run = leaves(study.run_settings(study.models[0], condition).model_dump())
    assert {key: value for key, value in run.items() if value != method[key]} == CHANGES[condition]


def test_conditions_with_the_same_teacher_share_its_targets() -> None:
    study = ContextDistillationConfig(conditions=("online_v1", "random_k", "kl_t1", "kl_t2", "kl_t4", "baseline"))
    assert {cache.mode for cache in study.caches(study.models[0]).values()} == {"top_k", "hidden"}
    assert len(study.caches(study.models[0])) == 2


def test_published_mistakes_are_known_by_the_conditions_that_repeat_them() -> None:
    settings = {
        "late": {"distillation": {"positions": "one_late"}},
        "permuted": {"teacher": {"context": {"exemplars": "shuffled_answers_as_published"}}},
        # Nothing is distilled, so nothing late.
        "alone": {"distillation": {"loss": "none", "positions": "one_late"}},
    }
    study = ContextDistillationConfig(
        conditions=("online_v1", *settings), condition_settings={**CONDITIONS, **settings}
    )
    assert study.repeated_mistakes(study.models[0]) == {
        "one_late": ["late"],
        "shuffled_answers_as_published": ["permuted"],
    }
