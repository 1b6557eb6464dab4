"""Every shipped configuration validates, alone and with the published protocol laid over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.workflow import merged

from stillhouse.studies.configuration import Configuration, load_configuration

CONFIG = Path(__file__).resolve().parents[2] / "config"
DEFAULT, AS_PUBLISHED = CONFIG / "config.yaml", CONFIG / "variants" / "as_published.yaml"
FOUR_GPUS = CONFIG / "variants" / "four_gpus.yaml"
ZERO2 = CONFIG / "variants" / "zero2.yaml"
EXPERIMENTS = sorted((CONFIG / "experiments").glob("*.yaml"))


def load(*files: Path) -> Configuration:
    values: dict = {}
    for file in files:
        values = merged(values, yaml.safe_load(file.read_text()))
    return load_configuration(values, files, {})


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_validates_with_and_without_the_published_protocol(file: Path) -> None:
    load(DEFAULT, file)
    assert load(DEFAULT, file, AS_PUBLISHED).context_distillation.evaluation.scorer == "as_published"


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_can_be_spread_over_four_gpus(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Where no model has been fetched: some have heads that four does not divide.
    spread = load(DEFAULT, file, FOUR_GPUS)
    assert (spread.resources.training.gpus, spread.resources.evaluation.gpus) == (2, 4)
    for engine in (spread.context_distillation.evaluation.engine, spread.lora_generation.evaluation.engine):
        assert engine.tensor_parallel == 4


def test_the_full_fine_tuning_of_8b_is_spread_by_fsdp_or_as_zero_stage_2_does() -> None:
    full = CONFIG / "experiments" / "context_qwen3_8b_full.yaml"
    for files, sharding in ((), "fsdp"), ((ZERO2,), "zero2"):
        study = load(DEFAULT, full, *files).context_distillation
        training = study.run_settings("qwen3_8b", "online_v1").training
        assert (training.method, training.sharding) == ("full", sharding)


def test_as_published_switches_every_known_mistake_on() -> None:
    study = load(DEFAULT, AS_PUBLISHED).context_distillation
    run = study.run_settings("smollm2_135m", "shuffled_answers")
    assert run.distillation.positions == "one_late"
    assert run.teacher.context.exemplars == "shuffled_answers_as_published"
    assert run.teacher.context.sampling == "per_example"
    assert study.evaluation.selection == "best_on_test"


def test_the_full_size_experiment_has_the_published_settings() -> None:
    study = load(DEFAULT, CONFIG / "experiments" / "context_qwen3_1_7b.yaml").context_distillation
    run = study.run_settings("qwen3_1_7b", "online_v1")
    published = Configuration().context_distillation.defaults
    assert run.training.model_copy(update={"micro_batch_tokens": 1}) == published.training.model_copy(
        update={"micro_batch_tokens": 1}
    )
    assert run.distillation == published.distillation
    assert run.teacher.context == published.teacher.context


def test_a_larger_teacher_is_a_cache_of_its_own() -> None:
    study = load(DEFAULT, CONFIG / "experiments" / "context_qwen3_8b_teaches_1_7b.yaml").context_distillation
    caches = study.caches("qwen3_1_7b")
    assert caches[study.run_settings("qwen3_1_7b", "online_v1").cache.name].model == "qwen3_8b"
