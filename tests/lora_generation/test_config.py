"""The configuration: which faults it finds while the DAG is built, and what a run's settings are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stillhouse.config.base import SettingError
from stillhouse.config.layering import merge
from stillhouse.models.lora_tensors import LoraLayout, ModuleShape
from stillhouse.studies.configuration import Configuration, load_configuration
from stillhouse.studies.lora_generation.config import EMBEDDED, LoraGenerationConfig
from stillhouse.studies.lora_generation.generator_settings import CONDITIONS, RunSettings
from stillhouse.studies.lora_generation.teacher_settings import TASKS, ShardSettings, TeacherSettings
from stillhouse.studies.lora_generation.tokens import WeightTokeniser

ROOT = Path(__file__).resolve().parents[2] / "config"
_TWO = {"tensor_parallel": 2}
# What is wrong, and a part of the message.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown task": ({"tasks": ["arc_easy", "boolk"]}, "unknown task 'boolk'.*boolq"),
    "an unknown condition": ({"conditions": ["multi_tusk"]}, "unknown condition 'multi_tusk'.*multi_task"),
    "a headline that is not trained": ({"evaluation": {"condition": "cosine"}}, "not among the trained conditions"),
    "a task held out that is not there": ({"defaults": {"held_out_tasks": ["boolk"]}}, "'boolk' is not among tasks"),
    "every task held out": (
        {"tasks": ["piqa", "boolq"], "defaults": {"held_out_tasks": ["piqa", "boolq"]}},
        "none is left",
    ),
    "shards of which none is left": ({"teachers": {"shards": 2, "held_out_shards": 2}}, "leave none to learn from"),
    "prompts that a shard lacks": ({"teachers": {"prompts": 999}}, "a shard has"),
    "prompts that are not kept": (
        {"defaults": {"generator": {"prompts": 200}}},
        "reads 200 prompts, teachers.prompts keeps",
    ),
    "no validation to select by": (
        {"teachers": {"validation_shards": 0}},
        "validation_loss needs teachers.validation_shards",
    ),
    "full fine-tuning": ({"teachers": {"training": {"method": "full"}}}, "teachers"),
    "a loss of nothing": ({"defaults": {"losses": {"weight": 0, "delta": 0}}}, "nothing to learn"),
    "an even kernel": ({"defaults": {"generator": {"kernel": 4}}}, "must be odd"),
    "a setting of the loop that is not read": ({"defaults": {"training": {"method": "full"}}}, "is not read here"),
    "a domain without its kind": ({"probes": {"domain": "reading"}}, "is for kind domain"),
    "activations that a generator would recompute": (
        {"defaults": {"training": {"gradient_checkpointing": True}}},
        "generators do not offer it: switch it off",
    ),
    "an override that does not exist": ({"condition_settings": {"multi_task": {"loss": {}}}}, "loss"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_while_the_dag_is_built(fault: str) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises((ValidationError, SettingError), match=message):
        LoraGenerationConfig.model_validate(merge(LoraGenerationConfig().model_dump(), changes))


def embedded() -> LoraGenerationConfig:
    return LoraGenerationConfig.model_validate(EMBEDDED)


def test_conditions_are_overrides_of_one_set_of_settings() -> None:
    study = LoraGenerationConfig()
    weights = {
        name: (run.losses.weight, run.losses.delta)
        for name in study.conditions
        if (run := study.run_settings("smollm2_135m", name))
    }
    assert weights == {
        "multi_task": (1.0, 0.1),
        "balanced": (0.5, 0.5),
        "delta_only": (0.0, 1.0),
        "weight_only": (1.0, 0.0),
    }
    assert study.seeds == (42, 123, 456)
    assert {"matrices_only", "cosine", "delta_guided", "hyper_convolution"} <= CONDITIONS.keys()


def experiment(name: str) -> LoraGenerationConfig:
    files = [ROOT / "config.yaml", ROOT / f"experiments/lora_generation_{name}.yaml"]
    default, own = (yaml.safe_load(file.read_text()) for file in files)
    return load_configuration(merge(default, own), files, {}).lora_generation


@pytest.mark.parametrize(
    ("name", "model"), [("qwen25_05b", "qwen25_05b_instruct"), ("qwen25_15b", "qwen25_15b_instruct")]
)
def test_the_full_size_experiments_have_the_published_settings(name: str, model: str) -> None:
    study = experiment(name)
    training = study.teachers.training
    assert study.models == (model,) and set(study.tasks) == set(TASKS) and len(study.tasks) == 8
    assert (training.lora.rank, training.lora.alpha, training.learning_rate, training.steps) == (16, 32, 2e-4, 500)
    ablations = {name: study.run_settings(model, name).losses for name in study.conditions}
    weights = {(losses.weight, losses.delta) for losses in ablations.values()}
    assert weights == {(1, 0.1), (0.5, 0.5), (0, 1), (1, 0)} and study.seeds == (42, 123, 456)
    assert {study.run_settings(model, name).held_out_tasks for name in study.conditions} == {(task,) for task in TASKS}


def test_the_drag_and_drop_experiment_has_its_own_setting() -> None:
    """Qwen2.5-0.5B in arXiv 2506.16406: seven targets, 4,296 tokens of 10 x 130, 128 prompts, learning rate 3e-5."""
    sizes = {
        "q_proj": (896, 896),
        "k_proj": (896, 128),
        "v_proj": (896, 128),
        "o_proj": (896, 896),
        "gate_proj": (896, 4864),
        "up_proj": (896, 4864),
        "down_proj": (4864, 896),
    }
    study = experiment("drag_and_drop")
    lora, run = study.teachers.training.lora, study.run_settings("qwen25_05b_instruct", "drag_and_drop")
    modules = [ModuleShape(f"model.layers.{n}.{name}", *sizes[name]) for n in range(24) for name in lora.target_modules]
    assert len(modules) == 24 * len(sizes)
    assert WeightTokeniser(LoraLayout(tuple(modules), lora.rank, lora.alpha), run.tokens).tokens == 4296
    assert (run.tokens.rows, run.tokens.columns, run.generator.prompts) == (10, 130, 128)
    assert (run.training.learning_rate, run.generator.kind, run.generator.start) == (3e-5, "hyper_convolution", "zero")
    assert (run.losses.weight, run.losses.weight_kind, run.losses.delta) == (1, "matrices", 0)
    assert study.teachers.collection == "checkpoints" and study.text.states == "tokens"


def test_as_published_follows_the_published_teachers_losses_and_selection() -> None:
    files = [ROOT / "config.yaml", ROOT / "variants" / "as_published.yaml"]
    default, own = (yaml.safe_load(file.read_text()) for file in files)
    study = load_configuration(merge(default, own), files, {}).lora_generation
    assert (study.teachers.collection, study.teachers.loss_tokens, study.teachers.flagged) == (
        "checkpoints",
        "all",
        "use",
    )
    assert study.evaluation.selection == "last"
    for condition in study.conditions:
        run = study.run_settings("smollm2_135m", condition)
        assert (run.generator.start, run.losses.weight_kind) == ("zero", "matrices")


def test_every_arm_that_reads_prompts_gets_all_that_the_generator_reads() -> None:
    for study in (LoraGenerationConfig(), embedded(), experiment("qwen25_05b"), experiment("qwen25_15b")):
        assert study.evaluation.in_context_examples is None


def test_the_engine_counts_only_where_a_task_has_worked_answers() -> None:
    gpus = {"resources": {"evaluation": {"gpus": 2}}, "context_distillation": {"evaluation": {"engine": _TWO}}}
    Configuration.model_validate({"lora_generation": {"tasks": ["piqa", "boolq"]}, **gpus})
    with pytest.raises(ValidationError, match=r"is 1, but resources\.evaluation\.gpus is 2"):
        Configuration.model_validate({"lora_generation": {"tasks": ["piqa", "gsm8k"]}, **gpus})


def test_a_model_overrides_the_defaults_and_a_condition_overrides_both() -> None:
    study = LoraGenerationConfig.model_validate(
        {
            "model_settings": {"smollm2_135m": {"generator": {"width": 32}, "losses": {"norm": 0.5, "weight": 3.0}}},
        }
    )
    run = study.run_settings("smollm2_135m", "balanced")
    assert (run.generator.width, run.losses.norm, run.losses.weight) == (32, 0.5, 0.5)


def test_a_sweep_can_leave_each_task_out_in_turn() -> None:
    axes = {"held_out_tasks": [["piqa"], ["boolq"]]}
    study = LoraGenerationConfig.model_validate({"sweeps": {"left_out": {"condition": "multi_task", "axes": axes}}})
    swept = [name for name in study.trained_conditions if name not in study.conditions]
    assert [study.run_settings("smollm2_135m", name).held_out_tasks for name in swept] == [("piqa",), ("boolq",)]


def test_every_adapter_has_one_part_in_a_generators_life() -> None:
    shards = ShardSettings(shards=5, validation_shards=1, held_out_shards=2)
    assert [shards.role("boolq", shard, ("piqa",)) for shard in range(5)] == [
        "train",
        "train",
        "validation",
        "held_out_shard",
        "held_out_shard",
    ]
    assert {shards.role("piqa", shard, ("piqa",)) for shard in range(5)} == {"held_out_task"}


def test_a_collection_has_every_task_shard_and_seed_and_every_checkpoint_where_asked() -> None:
    study = embedded()
    assert len(study.adapters) == len(study.tasks) * study.teachers.shards * len(study.teachers.seeds)
    assert len({teacher.name for teacher in study.adapters}) == len(study.adapters)
    training = {"steps": 10, "save_every": 4, "schedule": {"warmup_steps": 1}}
    teachers = TeacherSettings.model_validate({"collection": "checkpoints", "training": training})
    assert teachers.steps == (4, 8, 10)
    assert TeacherSettings.model_validate({"training": training}).steps == (10,)


def test_a_setting_that_training_does_not_read_makes_nothing_stale() -> None:
    compact, cascade = RunSettings(), RunSettings.model_validate({"generator": {"kind": "hyper_convolution"}})
    assert {"stages", "kernel"} & compact.leaves()["generator"].keys() == set()
    assert "layers" not in cascade.leaves()["generator"]
    assert "lora" not in compact.leaves()["training"]
    assert RunSettings.model_validate(compact.leaves()) == compact


def test_unknown_data_of_a_task_is_named_with_the_nearest() -> None:
    tasks = {"piqa": {"dataset": "pika_packaged"}, "boolq": {"dataset": "boolq"}}
    section = {"task_settings": tasks, "tasks": ["piqa", "boolq"]}
    with pytest.raises(ValidationError, match=r"unknown data set 'pika_packaged': .*piqa_packaged"):
        Configuration.model_validate({"lora_generation": section})
