"""The study's section of the configuration: what it refuses, what a run reads, which runs share a cache."""

from __future__ import annotations

from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.workflow import merged

from stillhouse.config.quantization import WeightFormat
from stillhouse.studies.configuration import embedded_configuration, load_configuration
from stillhouse.studies.quantized_distillation.config import QuantizedDistillationConfig
from stillhouse.studies.quantized_distillation.evaluation_settings import EvaluationSettings
from stillhouse.studies.quantized_distillation.run_settings import RunSettings

MODEL = "smollm2_135m"
FULL_SIZE = "qwen3_4b_instruct"
CONFIG = Path(__file__).resolve().parents[2] / "config"


@cache
def experiment(name: str) -> QuantizedDistillationConfig:
    """A shipped experiment over the default configuration."""
    return layered(CONFIG / f"experiments/quantized_{name}.yaml")


def layered(*over: Path) -> QuantizedDistillationConfig:
    """The study as shipped files over the default configuration make it."""
    files = (CONFIG / "config.yaml", *over)
    values = reduce(merged, (yaml.safe_load(file.read_text()) for file in files))
    return load_configuration(values, files, {}).quantized_distillation


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


def test_formats_are_told_apart_by_name_and_nothing_claims_nvfp4_arithmetic() -> None:
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
        "nvfp4-emulated",
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
    assert study.evaluation.answers and study.evaluation.answers >= 16
    assert all(text.tokens and text.tokens >= 16 * study.evaluation.stretch for text in study.evaluation.texts.values())


@pytest.mark.parametrize("name", ["qwen3_4b", "beta_lambda", "learning_rate", "rank_and_format"])
def test_the_full_size_experiments_have_the_published_settings(name: str) -> None:
    study, published = experiment(name), RunSettings()
    run = study.run_settings(FULL_SIZE, "on_policy")
    assert (study.models, len(study.seeds)) == ((FULL_SIZE,), 3)
    assert (run.training.batch_size, run.training.save_every) == (8, 100)
    same = {"micro_batch_tokens", "save_every", "resume_every"}
    assert run.training.model_dump(exclude=same) == published.training.model_dump(exclude=same)
    for part in ("max_length", "response_room", "lora_quantisation", "sampling", "format"):
        assert getattr(run, part) == getattr(published, part), part
    for part in ("window", "stride", "stretch", "answers", "gap_seeds"):
        assert getattr(study.evaluation, part) == getattr(EvaluationSettings(), part), part
    assert (study.baselines.samples, study.baselines.tokens) == (512, 2048)
    assert set(study.evaluation.tasks) == {"hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu"}
    assert all(task.items is None for task in study.evaluation.tasks.values())


def test_the_full_size_sweeps_are_the_published_grids() -> None:
    def points(name: str, sweep: str) -> list[tuple[Any, ...]]:
        # YAML takes 1e-6 for a word; the run's settings take the word for a number.
        return [tuple(map(number, point.values.values())) for point in experiment(name).sweeps[sweep].points()]

    def number(value: Any) -> Any:
        return float(value) if isinstance(value, str) and value[0].isdigit() else value

    assert points("beta_lambda", "grid") == [(beta, share) for beta in (0, 0.5, 1) for share in (0, 0.5, 1)]
    for policy in ("off_policy", "on_policy"):
        assert points("learning_rate", policy) == [(1e-6,), (5e-6,), (1e-5,), (5e-5,), (1e-4,)]
        assert experiment("learning_rate").sweeps[policy].condition == policy
    shares = (0, 1)
    ranks, formats = (4, 8, 16, 32, 64), ("int4", "nf4", "fp4")
    assert points("rank_and_format", "ranks") == [(rank, share) for rank in ranks for share in shares]
    assert points("rank_and_format", "formats") == [(kind, share) for kind in formats for share in shares]
    nvfp4 = experiment("rank_and_format").run_settings(FULL_SIZE, "on_policy_nvfp4")
    assert (nvfp4.format.name, nvfp4.distillation.on_policy_share) == ("nvfp4-emulated", 1)


@pytest.mark.parametrize("experiments", [(), ("qwen3_4b",)], ids=["default", "full size"])
def test_as_published_lora_stands_beside_the_weights_and_the_last_checkpoint_is_deployed(
    experiments: tuple[str, ...],
) -> None:
    files = [CONFIG / f"experiments/quantized_{name}.yaml" for name in experiments]
    corrected, published = layered(*files), layered(*files, CONFIG / "variants/as_published.yaml")
    assert (corrected.export.selection, published.export.selection) == ("validation_kl", "last")
    [model] = published.models
    for condition in ("off_policy", "on_policy"):
        before, after = (study.run_settings(model, condition) for study in (corrected, published))
        assert (before.lora_quantisation, after.lora_quantisation) == ("merged", "beside")
        assert before.model_copy(update={"lora_quantisation": "beside"}) == after, "nothing else differs"
