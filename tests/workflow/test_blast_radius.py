"""Which rules every setting and every module of context distillation reaches, without a run of Snakemake.

The rules' own functions say what a job reads. `test_workflow.py` shows for some settings and modules what then reruns
downstream; here no key and no module is left out.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic_core import to_jsonable_python
from snakemake.io import expand

from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import dotted_arguments
from stillhouse.studies.configuration import STUDIES, Configuration
from stillhouse.studies.context_distillation.config import ContextDistillationConfig

STUDY = "studies.context_distillation"
FUNCTIONS = Path(__file__).resolve().parents[2] / "rules" / "functions"
MODEL, CONDITIONS = "smollm2_135m", ("baseline", "online_v1", "kl_t1", "lora_teacher")
# Of a caching condition: what only its student reads, what its teacher reads, and what both do.
STUDENT, TEACHER, BOTH = {"train"}, {"teacher_cache", "train"}, {"task_teacher", "teacher_cache", "train"}
EVERY_TRAINING, TASK_TEACHER, EVALUATE, SPLIT = {"task_teacher", "train"}, {"task_teacher"}, {"evaluate"}, {"split"}
TRAINING: dict[str, Any] = {
    "method": "full",
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "steps": 900,
    "batch_size": 16,
    "micro_batch_tokens": 4096,
    "packing": False,
    "learning_rate": 1e-4,
    "learning_rate_multipliers": {"embed_tokens": 0.1},
    "weight_decay": 0.0,
    "max_gradient_norm": 2.0,
    "schedule.kind": "linear",
    "schedule.warmup_steps": 10,
    "schedule.final_factor": 0.1,
    "schedule.cycles": 2,
    "schedule.power": 2.0,
    "precision": "fp32",
    "gradient_checkpointing": True,
    "sharding": "fsdp",
    "save_every": 100,
    "resume_every": 20,
    "keep_resume_states": 3,
    "log_every": 10,
}
# Each key with another value, and the rules that must rerun because they read it.
REACHED: dict[str, tuple[Any, set[str]]] = {
    "task.split_seed": (43, SPLIT),
    "task.group_by": ("id", SPLIT),
    "task.train.source": ("train", SPLIT),
    "task.train.size": (300, SPLIT),
    "task.validation.source": ("train", SPLIT),
    "task.validation.size": (50, SPLIT),
    "task.test.source": ("train", SPLIT),
    "task.test.size": (100, SPLIT),
    "defaults.seed_offset": (1, EVERY_TRAINING),
    "defaults.prompt_format": ("plain", BOTH | EVALUATE),
    "defaults.max_length": (400, EVERY_TRAINING),
    "defaults.overlong": ("skip", BOTH),
    "defaults.train_examples": (300, BOTH),
    "defaults.teacher.model": ("qwen3_1_7b", TEACHER),
    "defaults.teacher.adapter": (True, TEACHER),
    "defaults.teacher.context.shots": (4, TEACHER),
    "defaults.teacher.context.sampling": ("grouped", TEACHER),
    "defaults.teacher.context.groups": (8, TEACHER),
    "defaults.teacher.context.exemplars": ("question_only", TEACHER),
    "defaults.teacher.context.seed": (43, TEACHER),
    "defaults.teacher.max_length": (2048, TEACHER),
    "defaults.teacher.targets": ("online", TEACHER),
    "defaults.teacher.cache_top_k": (512, TEACHER),
    "defaults.teacher.precision": ("fp32", TEACHER),
    "defaults.teacher.batch_tokens": (4096, TEACHER),
    "defaults.distillation.loss": ("kl", TEACHER),
    "defaults.distillation.weight": (1.0, STUDENT),
    "defaults.distillation.top_k": (64, STUDENT),
    "defaults.distillation.temperature": (3.0, STUDENT),
    "defaults.distillation.positions": ("one_late", STUDENT | EVALUATE),
    "defaults.distillation.only_first_steps": (100, STUDENT),
    "defaults.distillation.only_last_steps": (100, STUDENT),
    **{f"defaults.training.{key}": (value, STUDENT) for key, value in TRAINING.items()},
    **{f"task_teacher.{key}": (value, TASK_TEACHER) for key, value in TRAINING.items()},
    "evaluation.transfer": ({"basic_arithmetic_packaged": {"source": "test"}}, EVALUATE),
    "evaluation.engine.kind": ("transformers", EVALUATE),
    "evaluation.engine.precision": ("fp32", EVALUATE),
    "evaluation.engine.batch_size": (32, EVALUATE),
    "evaluation.engine.max_model_length": (2048, EVALUATE),
    "evaluation.engine.kv_cache_gib": (4.0, EVALUATE),
    "evaluation.engine.gpu_memory_fraction": (0.5, EVALUATE),
    "evaluation.engine.tensor_parallel": (2, EVALUATE),
    "evaluation.generation.max_new_tokens": (256, EVALUATE),
    "evaluation.generation.temperature": (1.0, EVALUATE),
    "evaluation.generation.top_p": (0.9, EVALUATE),
    "evaluation.generation.seed": (1, EVALUATE),
    "evaluation.few_shot_counts": ([2], EVALUATE),
    "evaluation.shots_seed": (43, EVALUATE),
    "evaluation.steps": ([1000], EVALUATE),
    "evaluation.validation_items": (10, EVALUATE),
    "evaluation.test_items": (10, EVALUATE),
    "evaluation.generated_items": (10, EVALUATE),
    "evaluation.selection": ("last", EVALUATE),
    "evaluation.scorer": ("as_published", EVALUATE),
    "evaluation.batch_tokens": (4096, EVALUATE),
}
# Each module that a step of the study reaches, under the rules whose jobs a change of its code makes again.
REACHED_BY: dict[str, str] = {
    "split": ("data.record_files data.split data.splits"),
    "split teacher_cache train evaluate": (
        "assets assets.answers assets.records config.assets data data.records runtime.code_digests "
        "runtime.device_usage runtime.digests runtime.records runtime.scheduler"
    ),
    "split teacher_cache train evaluate figures report": (
        "config config.base config.layering runtime runtime.commands runtime.errors runtime.files "
        "runtime.logs stillhouse"
    ),
    "split evaluate": ("config.data"),
    "teacher_cache train": ("models.output_head models.target_cache study.data study.teacher"),
    "teacher_cache train evaluate": (
        "config.training data.exemplars data.packing data.prompts models models.loading models.lora "
        "models.precision models.prefix runtime.seeds study.run_settings"
    ),
    "teacher_cache train evaluate figures report": ("studies study"),
    "train": (
        "study.objective study.train training training.checkpoints training.data_order training.loading "
        "training.loop training.objective training.optimizers training.processes training.schedules "
        "training.sharding training.tracking"
    ),
    "evaluate": (
        "config.evaluation config.references config.runs evaluation.engines "
        "evaluation.engines.base evaluation.engines.checks evaluation.engines.transformers_engine "
        "evaluation.engines.vllm_cpu_lora evaluation.engines.vllm_engine evaluation.instruction_following "
        "evaluation.perplexity evaluation.scorers study.config study.evaluate"
    ),
    "evaluate figures report": (
        "config.sweeps evaluation evaluation.results_files evaluation.statistics study.results"
    ),
    "figures": (
        "study.figures.ablation_bars study.figures.ablation_curve study.figures.loss study.figures.summary "
        "study.figures.sweep"
    ),
    "figures report": (
        "reporting reporting.steps reporting.style reporting.sweeps reporting.tables study.comparisons study.figures "
        "study.figures.checkpoint_curve study.sweeps"
    ),
    "report": ("study.report study.tables"),
}
STEPS = {
    "split": ["data.split"],
    "teacher_cache": ["study.teacher"],
    "train": ["study.train"],
    "evaluate": ["study.evaluate"],
    "figures": [
        f"study.figures.{name}"
        for name in ("summary", "checkpoint_curve", "ablation_curve", "ablation_bars", "loss", "sweep")
    ],
    "report": ["study.report"],
}
# What must be so on both sides for a change to be allowed.
NEEDED: dict[str, tuple[str, Any]] = {
    "defaults.teacher.targets": ("condition_settings.lora_teacher", {}),
    "defaults.training.sharding": ("defaults.training.method", "full"),
    "task_teacher.sharding": ("task_teacher.method", "full"),
}


def configured(*changes: tuple[str, Any]) -> Configuration:
    """The published configuration of four conditions, with changes by dotted key."""
    study = ContextDistillationConfig(models=(MODEL,), conditions=CONDITIONS).model_dump(mode="json")
    for key, value in changes:
        *path, last = key.split(".")
        place = study
        for name in path:
            place = place[name]
        place[last] = value
    tracking = {"trackers": [], "project": "stillhouse"} | study.pop("tracking", {})
    gpus = {"evaluation": {"gpus": study["evaluation"]["engine"]["tensor_parallel"]}}
    return Configuration.model_validate(
        {
            "studies": ["context_distillation"],
            "context_distillation": study,
            "resources": gpus,
            "tracking": tracking,
        }
    )


def what_rules_read(configuration: Configuration) -> dict[str, Any]:
    """By rule: the settings and inputs of each of its jobs, as the functions of the rules give them."""
    rules: dict[str, Any] = {
        "CONFIGURATION": configuration,
        "expand": expand,
        "known": lambda what, name, valid: name,
        "settings": lambda **leaves: dotted_arguments(to_jsonable_python(leaves)),
        "code_digests": code_digests,
        "STUDIES": STUDIES,
    }
    for name in ("data", "context_distillation"):
        exec(compile((FUNCTIONS / f"{name}.smk").read_text(), f"{name}.smk", "exec"), rules)
    study = configuration.context_distillation
    caches, trained = study.caches(MODEL), study.trained_conditions

    def job(**wildcards: str) -> SimpleNamespace:
        return SimpleNamespace(model=MODEL, seed="42", study="context_distillation", **wildcards)

    return {
        "split": rules["split_settings"](job(dataset=study.task.dataset)),
        "task_teacher": rules["context_task_teacher_settings"](job()),
        "teacher_cache": {
            name: (rules["context_cache_settings"](job(cache=name)), rules["context_cache_inputs"](job(cache=name)))
            for name in caches
        },
        "train": {
            name: (
                rules["context_train_settings"](job(condition=name)),
                rules["context_train_inputs"](job(condition=name)),
            )
            for name in trained
        },
        "evaluate": (rules["context_evaluate_settings"](job()), rules["CONTEXT_TRANSFER"]),
    }


def leaves(settings: dict[str, Any], prefix: str) -> list[str]:
    """The dotted keys of settings."""
    found: list[str] = []
    for key, value in settings.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return found


def test_every_key_is_in_the_table() -> None:
    study = configured().context_distillation.model_dump(mode="json")
    parts = ("task", "defaults", "task_teacher", "evaluation")
    keys = {key for part in parts for key in leaves(study[part], f"{part}.")} - {"task.dataset"}
    assert keys == REACHED.keys()


@pytest.mark.parametrize("key", REACHED)
def test_a_setting_reaches_exactly_the_rules_that_read_it(key: str) -> None:
    value, reached = REACHED[key]
    needed = [NEEDED[key]] if key in NEEDED else []
    before, after = (what_rules_read(configured(*needed, *changes)) for changes in ([], [(key, value)]))
    assert {rule for rule in before if before[rule] != after[rule]} == reached


def test_another_tracker_reaches_the_trainings_alone() -> None:
    before, after = what_rules_read(configured()), what_rules_read(configured(("tracking", {"trackers": ["wandb"]})))
    assert {rule for rule in before if before[rule] != after[rule]} == EVERY_TRAINING


def test_a_module_reaches_exactly_the_rules_that_run_its_code() -> None:
    reached: dict[str, list[str]] = {}
    for rule, steps in STEPS.items():
        modules = {module for step in steps for module in code_digests(f"stillhouse.{step.replace('study', STUDY)}")}
        for module in modules:
            reached.setdefault(module.removeprefix("stillhouse.").replace(STUDY, "study"), []).append(rule)
    table = {module: rules.split() for rules, modules in REACHED_BY.items() for module in modules.split()}
    assert reached == table
