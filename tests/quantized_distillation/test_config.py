"""The study's section of the configuration: what it refuses, what a run reads, which runs share a cache."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.config.quantization import WeightFormat
from stillhouse.studies.configuration import embedded_configuration
from stillhouse.studies.quantized_distillation.config import QuantizedDistillationConfig
from stillhouse.studies.quantized_distillation.run_settings import RunSettings

MODEL = "smollm2_135m"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"distillation": {"on_policy_share": 1.5}}, "less than or equal to 1"),
        ({"distillation": {"beta": -0.1}}, "greater than or equal to 0"),
        ({"sampling": {"min_new_tokens": 129}}, r"min_new_tokens \(129\) must not be above max_new_tokens \(128\)"),
        ({"format": {"kind": "int3"}}, "'int4', 'nvfp4', 'nf4' or 'fp4'"),
        ({"format": {"kind": "nvfp4", "group_size": 32}}, r"group_size \(32\) of nvfp4 is always 16: leave it unset"),
        ({"format": {"kind": "nf4", "symmetric": False}}, "symmetric false is for kind int4"),
        ({"format": {"emulated": True}}, "emulated is for kind nvfp4"),
        ({"training": {"method": "full"}}, "must be lora"),
        ({"max_length": 32}, r"response_room \(32\) must be below max_length \(32\)"),
        ({"validation": {"window": 128}}, r"stride \(512\) must not be above window \(128\)"),
        ({"lora_quantisation": "inside"}, "'merged' or 'beside'"),
    ],
)
def test_impossible_runs_are_refused_with_the_reason(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunSettings.model_validate(overrides)


def test_the_published_size_is_the_default() -> None:
    run = RunSettings()
    assert (run.training.steps, run.training.learning_rate, run.training.schedule.warmup_steps) == (1000, 5e-6, 200)
    assert (run.training.lora.rank, run.training.lora.alpha, run.training.lora.dropout) == (32, 64, 0.05)
    assert len(run.training.lora.target_modules) == 7
    assert (run.sampling.temperature, run.sampling.min_new_tokens, run.sampling.max_new_tokens) == (0.9, 16, 128)
    assert (run.max_length, run.response_room, run.lora_quantisation) == (1024, 32, "merged")


def test_conditions_differ_in_whose_answers_they_learn_from_alone() -> None:
    study = QuantizedDistillationConfig()
    off, on = (study.run_settings(MODEL, name) for name in ("off_policy", "on_policy"))
    assert (off.distillation.on_policy_share, on.distillation.on_policy_share) == (0, 1)
    assert off.model_copy(update={"distillation": on.distillation}) == on


def test_runs_share_a_cache_whatever_their_loss_and_only_runs_on_data_read_one() -> None:
    study = QuantizedDistillationConfig.model_validate(
        {
            "conditions": ("off_policy", "on_policy", "mixed_policy", "teacher_samples"),
            "sweeps": {
                "lr": {"condition": "off_policy", "axes": {"training.learning_rate": (1e-6, 1e-4)}},
                "formats": {"condition": "off_policy", "axes": {"format.kind": ("int4", "nf4")}},
            },
        }
    )
    assert len(study.caches(MODEL)) == 1
    assert study.run_settings(MODEL, "mixed_policy").cache is not None
    assert study.run_settings(MODEL, "on_policy").cache is None
    assert study.run_settings(MODEL, "teacher_samples").cache is None
    assert list(study.formats(MODEL)) == ["int4-g128", "nf4"]


def test_a_run_does_not_depend_on_settings_that_it_never_reads() -> None:
    def leaves(**overrides: Any) -> dict[str, Any]:
        return RunSettings.model_validate(overrides).leaves()

    off, on = {"distillation": {"on_policy_share": 0.0}}, {"distillation": {"on_policy_share": 1.0}}
    assert leaves(**off) == leaves(**off, sampling={"max_new_tokens": 64})
    assert leaves(**on) != leaves(**on, sampling={"max_new_tokens": 64})
    assert leaves(**on) == leaves(**on, teacher={"targets": "online"})
    assert leaves(**off) != leaves(**off, teacher={"targets": "online"})
    assert leaves(**off) == leaves(**off, teacher={"batch_tokens": 1024})


def test_formats_are_told_apart_by_name() -> None:
    formats = [
        WeightFormat(),
        WeightFormat(group_size=64),
        WeightFormat(group_size=64, symmetric=False),
        WeightFormat(kind="nvfp4"),
        WeightFormat(kind="nvfp4", emulated=True),
        WeightFormat(kind="nf4"),
        WeightFormat(kind="fp4"),
    ]
    assert [each.name for each in formats] == [
        "int4-g128",
        "int4-g64",
        "int4-g64-asymmetric",
        "nvfp4",
        "nvfp4-emulated",
        "nf4",
        "fp4",
    ]


def test_the_default_shows_a_gap_and_has_three_seeds() -> None:
    study = embedded_configuration().quantized_distillation
    chosen = study.subject_defaults(MODEL).format
    assert (chosen.kind, chosen.group, chosen.symmetric) == ("int4", 64, True)
    assert len(study.seeds) == 3
    assert {"teacher", "ptq", "off_policy", "on_policy"} <= set(study.conditions)
