"""The configuration: layers of a channel's settings, what makes a channel stale, and one line for each fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.workflow import merged

from stillhouse.config.layering import Layer, validate
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.configuration import Configuration, load_configuration
from stillhouse.studies.latentwire.config import ARMS, EMBEDDED, LatentWireConfig
from stillhouse.studies.latentwire.run_settings import RunSettings

CONFIG = Path(__file__).resolve().parents[2] / "config"
PAIR = "smollm2_gemma3"
BASE = LatentWireConfig.model_validate(EMBEDDED).model_dump(mode="json")


def load(study: dict[str, Any]) -> LatentWireConfig:
    return validate(LatentWireConfig, merged(BASE, study), [Layer("latentwire", {})])


def load_file(*names: str) -> LatentWireConfig:
    values: dict[str, Any] = {}
    files = [CONFIG / name for name in ("config.yaml", *names)]
    for file in files:
        values = merged(values, yaml.safe_load(file.read_text()))
    return load_configuration(values, files, {}).latentwire


def test_a_channels_settings_are_defaults_then_pair_then_condition_then_sweep_point():
    study = load(
        {
            "conditions": ["latent", "prefix_kd"],
            "defaults": {"latent": {"length": 7}, "adapter": {"hidden_multiple": 1.0}},
            "pair_settings": {PAIR: {"settings": {"adapter": {"hidden_multiple": 3.0, "film": True}}}},
            "condition_settings": {"prefix_kd": {"adapter": {"hidden_multiple": 5.0}}},
            "sweeps": {"length": {"condition": "prefix_kd", "axes": {"latent.length": [3], "latent.dimension": [16]}}},
        }
    )
    latent, kd = (study.run_settings(PAIR, name) for name in ("latent", "prefix_kd"))
    swept = study.run_settings(PAIR, "prefix_kd+length-3+dimension-16")
    assert (latent.latent.length, latent.adapter.hidden_multiple, latent.adapter.film) == (7, 3.0, True)
    assert (kd.latent.length, kd.adapter.hidden_multiple, kd.losses.kd) == (7, 5.0, 1.0)
    assert (swept.latent.length, swept.latent.dimension, swept.losses.kd) == (3, 16, 1.0)
    assert study.trained_conditions == ("latent", "prefix_kd", "prefix_kd+length-3+dimension-16")


def test_channels_that_agree_on_the_text_teacher_share_its_cache():
    study = load(
        {
            "conditions": ["latent", "prefix_kd", "state_kd", "strong"],
            "condition_settings": {"strong": {"losses": {"kd": 2.0, "k": 2}, "training": {"learning_rate": 1e-4}}},
        }
    )
    assert len(study.caches(PAIR)) == 1
    assert study.run_settings(PAIR, "latent").cache is None
    changed = load({"conditions": ["latent", "prefix_kd"], "defaults": {"reader": {"anchor": "A: "}}})
    assert study.caches(PAIR).keys().isdisjoint(changed.caches(PAIR))


def test_settings_that_a_channel_does_not_read_do_not_make_it_stale():
    def leaves(**changes: Any) -> dict[str, Any]:
        return RunSettings.model_validate(changes).leaves()

    assert leaves(teacher={"batch_tokens": 64}) == leaves()
    assert leaves(encoder={"lora": {"rank": 3}}) == leaves()
    assert leaves(encoder={"kind": "language_model", "lora": {"rank": 3}}) != leaves(encoder={"kind": "language_model"})
    taught = {"losses": {"kd": 1.0}}
    assert leaves(**taught, teacher={"batch_tokens": 64}) == leaves(**taught)
    assert leaves(**taught, teacher={"targets": "online"}) != leaves(**taught)
    for run in ({}, taught, {"reader": {"lora": {"rank": 2}}}):
        assert RunSettings.model_validate(leaves(**run)).leaves() == leaves(**run)


def test_the_default_uses_what_the_catalogue_has_from_packages_alone():
    study = load_file()
    names = {reference.name for reference in study.references()}
    assert names == {"smollm2_135m", "gemma3_270m", "squad_packaged"}
    assert study.evaluation.arms == ARMS
    assert study.task.group_by == "title"


def test_the_full_size_experiment_is_the_one_of_the_protocol():
    study = load_file("experiments/latentwire_squad.yaml")
    run = study.run_settings("llama31_qwen25", "latent")
    assert study.pair_settings["llama31_qwen25"].models == ("llama31_8b_instruct", "qwen25_7b_instruct")
    assert run.training.steps == 24 * 87_599 // 64 + 1
    assert (run.training.batch_size, run.training.learning_rate) == (64, 1e-4)
    assert (run.latent.length, run.latent.dimension) == (32, 256)
    assert (run.encoder.kind, run.encoder.layers, run.encoder.width) == ("bytes", 6, 256)
    own = RunSettings()
    assert (run.latent, run.losses) == (own.latent, own.losses)
    lengths = {study.run_settings("llama31_qwen25", name).latent.length for name in study.trained_conditions}
    assert lengths == {8, 16, 32, 48, 64}


def test_as_published_cuts_texts_and_reports_the_last_checkpoint():
    study = load_file("experiments/latentwire_squad.yaml", "variants/as_published.yaml")
    run = study.run_settings("llama31_qwen25", "latent")
    assert (run.encoder.max_length, run.encoder.overlong, run.encoder.max_cut_share) == (512, "cut_end", 1.0)
    assert (run.losses.kd, run.losses.first_k) == (1.0, 0.5)
    assert study.evaluation.selection == "last"
    generation = study.evaluation.generation
    assert (generation.first_token_temperature, generation.first_token_top_p, generation.ban_first_eos) == (
        0.7,
        0.9,
        True,
    )
    corrected = load_file("experiments/latentwire_squad.yaml").evaluation.generation
    assert (corrected.first_token_temperature, corrected.ban_first_eos) == (0.0, False)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"defaults": {"latent": {"length": 0}}}, r"'defaults.latent.length'.*greater than or equal to 1"),
        ({"defaults": {"latent": {"length": 2000}}}, r"latent.length'.*less than or equal to 1024"),
        ({"defaults": {"latent": {"length": 8, "private": 5}}}, r"5 private vectors for each of 2 models do not fit"),
        ({"evaluation": {"wire": {"formats": ["int3"]}}}, r"'evaluation.wire.formats.0'.*int3"),
        ({"evaluation": {"wire": {"formats": ["fp16"]}}}, r"headline \(int8\) must be one of formats \(fp16\)"),
        ({"evaluation": {"wire": {"group_size": 0}}}, r"'evaluation.wire.group_size'"),
        ({"evaluation": {"arms": ["latent", "telepathy"]}}, r"'evaluation.arms.1'.*telepathy"),
        ({"evaluation": {"condition": "latnt"}}, r"'evaluation.condition'.*did you mean 'latent'"),
        ({"evaluation": {"steps": [7]}}, r"step 7 is never saved by latent: it saves"),
        ({"pairs": ["smollm_gemma"]}, r"'pairs': unknown pair 'smollm_gemma': did you mean"),
        ({"pair_settings": {PAIR: {"models": ["smollm2_135m", "smollm2_135m"]}}}, r"models must differ"),
        ({"pair_settings": {PAIR: {"models": ["v2.5"]}}}, r"cannot hold a dot"),
        (
            {"conditions": ["latent", "film2"]},
            r"'conditions': unknown condition 'film2': did you mean 'film'",
        ),
        ({"condition_settings": {"latent": {"losses": {"ke": 1}}}}, r"latent.losses.ke': unknown key: did you mean"),
        ({"defaults": {"encoder": {"width": 30}}}, r"width \(30\) must be a multiple of heads \(4\)"),
        ({"defaults": {"encoder": {"kind": "sentence"}}}, r"kind sentence needs 'model'"),
        (
            {"defaults": {"encoder": {"kind": "language_model", "model": "qwen3_8b"}}},
            r"encoder.model': 'qwen3_8b' is not of pair smollm2_gemma3",
        ),
        ({"defaults": {"training": {"method": "full"}}}, r"'defaults.training.method': is not read here"),
        ({"defaults": {"losses": {"ce": 0, "first_token": 0}}}, r"'defaults.losses': at least one of"),
        (
            {"defaults": {"reader": {"prefix_tuning": 4}, "training": {"gradient_checkpointing": True}}},
            r"'defaults.training.gradient_checkpointing'",
        ),
    ],
)
def test_a_fault_is_one_line_that_names_the_key(study: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message) as caught:
        load(study)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"pair_settings": {PAIR: {"models": ["smollm2_135m", "gema3_270m"]}}},
            r"'latentwire.pair_settings.smollm2_gemma3.models': unknown model 'gema3_270m': did you mean 'gemma3_270m'",
        ),
        ({"task": {"dataset": "squat"}}, r"'latentwire.task.dataset': unknown data set 'squat': did you mean 'squad'"),
    ],
)
def test_a_name_that_the_catalogue_lacks_is_refused_with_the_nearest(study: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        load_configuration({"latentwire": merged(BASE, study)}, [], {})


def test_every_condition_resolves_for_every_pair_at_full_size():
    study = LatentWireConfig()
    for pair in study.pair_settings:
        for condition in study.condition_settings:
            run = study.run_settings(pair, condition)
            assert run.latent.shared(len(study.pair_settings[pair].models)) > 0
    assert Configuration().latentwire == study
