"""Training a generator: what it may learn from, what it leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import run_step_in_two

from stillhouse.config.training import TrackingSettings
from stillhouse.models.lora import ADAPTER_WEIGHTS
from stillhouse.models.lora_tensors import read_adapter, relative_error
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest, write_manifest
from stillhouse.studies.lora_generation import train as step_program
from stillhouse.studies.lora_generation.generator_settings import RunSettings, TextSettings
from stillhouse.studies.lora_generation.generators import load_generator
from stillhouse.studies.lora_generation.manifest import read_collection
from stillhouse.studies.lora_generation.objective import GeneratorObjective
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, read_prompts
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from stillhouse.studies.lora_generation.train import TrainStep, main
from stillhouse.training.tracking import read_metrics
from tests.lora_generation.conftest import TinyStudy
from tests.lora_generation.tiny_collection import checkpoint_tensors, make_collection
from tests.support.tiny_models import make_tiny_sentence_encoder

TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "schedule": {"warmup_steps": 1},
    "save_every": 3,
    "resume_every": 2,
    "precision": "fp32",
}


def step_of(study: TinyStudy, folder: Path, run: dict[str, Any] | None = None, **changes: Any) -> TrainStep:
    settings = {
        "held_out_tasks": ["numbers"],
        "generator": {"prompts": 3, "width": 16, "layers": 1},
        "tokens": {"rows": 2, "columns": 10},
        "training": TRAINING,
    }
    values: dict[str, Any] = {
        "model": study.model,
        "adapters": study.adapters,
        "deltas": study.deltas,
        "encoder": study.encoder,
        "output": folder / "output",
        "work": folder / "work",
        "embeddings": folder / "embeddings",
        "model_name": "tiny",
        "condition": "multi_task",
        "seed": 42,
        "run": RunSettings.model_validate(settings | (run or {})),
        "shards": ShardSettings(shards=4, validation_shards=1, held_out_shards=1),
        "text": TextSettings(),
        "tracking": TrackingSettings(),
    }
    return TrainStep.model_validate(values | changes)


@pytest.fixture(scope="module")
def finished(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    main(step_of(tiny_study, folder))
    return folder


def test_held_out_tasks_and_shards_are_never_learnt_from(finished: Path) -> None:
    names = json.loads((finished / "output" / "run.json").read_text())["adapters"]
    assert names == [f"{task}/shard_{shard}-seed_42/step_10" for task in ("apples", "rivers") for shard in (0, 1)]


def test_training_leaves_checkpoints_a_plan_and_validated_metrics(finished: Path) -> None:
    output = finished / "output"
    verify_manifest(output)
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["delta_w"] > 0
    expected = {"loss", "delta_w", "matrices", "delta", "cosine_distance", "norm"}
    for row in rows:
        validated = {name.partition("/")[2] for name in row if name.startswith("validation/")}
        assert validated == (expected if row["step"] in (3, 6) else set())
    assert {path.name for path in output.iterdir()} >= {"checkpoint-3", "checkpoint-6", "generator.json", "run.json"}


def test_a_checkpoint_generates_an_adapter_for_new_prompts(finished: Path, tiny_study: TinyStudy) -> None:
    encoder = PromptEncoder(tiny_study.encoder, TextSettings(), finished / "embeddings")
    generator = load_generator(finished / "output" / "checkpoint-6")
    [name] = [row.name for row in read_collection(tiny_study.adapters) if row.task == "numbers" and row.shard == 0]
    prompts = read_prompts(tiny_study.adapters / name / PROMPTS_FILE)
    made = generator.generate(prompts, encoder)
    assert made.layout == read_adapter(tiny_study.adapters / name).layout
    assert relative_error(generator.generate(prompts[:3], encoder), made) == 0
    assert relative_error(generator.generate(prompts[2:], encoder), made) > 0
    with pytest.raises(UserError, match="2 are given, the generator reads 3"):
        generator.generate(prompts[:2], encoder)
    other = make_tiny_sentence_encoder(finished / "other", seed=1)
    with pytest.raises(UserError, match="other: is not the text encoder that the generator was trained with"):
        generator.generate(prompts, PromptEncoder(other, TextSettings(), finished / "embeddings"))


def test_an_interrupted_run_ends_with_the_same_weights(
    finished: Path, tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(GeneratorObjective):
        def __call__(self, model: torch.nn.Module, micro_batch: Any, step: int) -> Any:
            if step == 5:
                raise KeyboardInterrupt
            return super().__call__(model, micro_batch, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step_program, "GeneratorObjective", Interrupted)
        main(step_of(tiny_study, tmp_path))
    assert not (tmp_path / "output").exists()
    main(step_of(tiny_study, tmp_path))
    assert json.loads((tmp_path / "output" / "run.json").read_text())["training"]["resumed_from"] == 4
    whole, resumed = (checkpoint_tensors(folder / "output" / "checkpoint-6") for folder in (finished, tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor.nan_to_num(), resumed[name].nan_to_num()) for name, tensor in whole.items())


def test_micro_batches_do_not_change_the_result(finished: Path, tiny_study: TinyStudy, tmp_path: Path) -> None:
    main(step_of(tiny_study, tmp_path, {"training": {**TRAINING, "micro_batch_tokens": 1}}))
    whole, small = (checkpoint_tensors(folder / "output" / "checkpoint-6") for folder in (finished, tmp_path))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, small[name], atol=2e-4, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    "run",
    [
        {"losses": {"weight": 1, "delta": 0, "weight_kind": "matrices"}},
        {"losses": {"weight": 0, "delta": 1, "delta_kind": "cosine", "guided": True}},
        {
            "generator": {
                "kind": "hyper_convolution",
                "prompts": 3,
                "kernel": 3,
                "stages": [{"tokens": 8, "rows": 3, "columns": 12}],
                "start": "zero",
            }
        },
    ],
)
def test_other_losses_and_generators_train_through_the_same_step(
    run: dict[str, Any], tiny_study: TinyStudy, tmp_path: Path
) -> None:
    short = {**TRAINING, "steps": 4, "save_every": 2}
    text = TextSettings(states="tokens", length=4) if "generator" in run else TextSettings()
    main(step_of(tiny_study, tmp_path, {"training": short, **run}, text=text))
    rows = read_metrics(tmp_path / "output" / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    load_generator(tmp_path / "output" / "checkpoint-2")


def test_flagged_adapters_are_left_out_unless_asked_for(tiny_study: TinyStudy, tmp_path: Path) -> None:
    flagged = ["apples/shard_0-seed_42/step_10"]
    adapters = make_collection(tmp_path / "adapters", tiny_study.model, flagged=flagged)
    short = {"training": {**TRAINING, "steps": 2, "save_every": 2}}
    main(step_of(tiny_study, tmp_path / "excluded", short, adapters=adapters))
    assert len(json.loads((tmp_path / "excluded" / "output" / "run.json").read_text())["adapters"]) == 3
    used = ShardSettings(shards=4, validation_shards=1, held_out_shards=1, flagged="use")
    main(step_of(tiny_study, tmp_path / "used", short, adapters=adapters, shards=used))
    assert json.loads((tmp_path / "used" / "output" / "run.json").read_text())["adapters"][0] == flagged[0]


def _all_flagged(adapters: Path, study: TinyStudy) -> None:
    names = [row.name for row in read_collection(adapters)]
    shutil.rmtree(adapters)
    make_collection(adapters, study.model, flagged=names)


def _change(change: Callable[[Path], object]) -> Callable[[Path, TinyStudy], None]:
    """Change the first adapter's folder, and have the manifest agree."""

    def apply(adapters: Path, study: TinyStudy) -> None:
        rows = [row.model_dump(mode="json") for row in read_collection(adapters)]
        change(adapters / rows[0]["name"])
        write_manifest(adapters, {"adapters": rows})

    return apply


def _other_rank(adapters: Path, study: TinyStudy) -> None:
    other = make_collection(adapters.parent / "other", study.model, rank=3)
    rows = [row.model_dump(mode="json") for row in read_collection(adapters)]
    shutil.rmtree(adapters / rows[1]["name"])
    shutil.copytree(other / rows[1]["name"], adapters / rows[1]["name"])
    write_manifest(adapters, {"adapters": rows})


FAULTS: dict[str, tuple[Callable[[Path, TinyStudy], None], str]] = {
    "an adapter of another rank": (_other_rank, r"shard_1-seed_42/step_10: has rank 3, the other adapters 2"),
    "missing prompts": (
        _change(lambda folder: (folder / PROMPTS_FILE).unlink()),
        r"step_10/prompts.json: does not exist",
    ),
    "prompts without texts": (
        _change(lambda folder: (folder / PROMPTS_FILE).write_text('{"prompts": []}')),
        r"step_10/prompts.json: holds no list 'prompts' of texts",
    ),
    "fewer prompts than are read": (
        _change(lambda folder: (folder / PROMPTS_FILE).write_text('{"prompts": ["one"]}')),
        r"step_10/prompts.json: has 1 prompts, generator.prompts is 3",
    ),
    "a corrupt safetensors file": (
        _change(lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"garbage")),
        rf"step_10/{ADAPTER_WEIGHTS}: is corrupt or half written",
    ),
    "only flagged adapters": (_all_flagged, r"no adapter is left for 'train' \(4 are flagged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tiny_study: TinyStudy, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    adapters = tmp_path / "adapters"
    shutil.copytree(tiny_study.adapters, adapters)
    spoil(adapters, tiny_study)
    with pytest.raises(UserError, match=message):
        main(step_of(tiny_study, tmp_path, adapters=adapters))
    assert not (tmp_path / "output").exists()


@pytest.mark.xdist_group("programs")
def test_two_processes_train_the_generator_of_one(tiny_study: TinyStudy, tmp_path: Path) -> None:
    """A batch of three splits unevenly; validation is left to one of the two."""
    run = {"training": TRAINING | {"batch_size": 3}}
    one, two = step_of(tiny_study, tmp_path / "one", run), step_of(tiny_study, tmp_path / "two", run)
    main(one)
    run_step_in_two("stillhouse.studies.lora_generation.train", two)
    alone, together = (read_metrics(step.output / "metrics.jsonl") for step in (one, two))
    for key in ("loss", "delta_w", "validation/loss"):
        assert [row.get(key) for row in together] == pytest.approx([row.get(key) for row in alone], rel=1e-4), key
    weights = [load_generator(step.output / "checkpoint-6").state_dict() for step in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3, equal_nan=True)
