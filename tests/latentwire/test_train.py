"""The training step: whole outputs, exact resumption, and one line for each thing that cannot be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentwire.tiny_readers import FAMILIES, make_families
from safetensors.torch import load_file
from support.forked import run_step_in_two
from support.tiny_models import make_tiny_sentence_encoder

from stillhouse.config.training import TrackingSettings
from stillhouse.data.records import write_records
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest, write_manifest
from stillhouse.studies.latentwire import train as train_module
from stillhouse.studies.latentwire.channel import WEIGHTS, Channel
from stillhouse.studies.latentwire.curves import DIAGNOSTICS_FILE, read_diagnostics
from stillhouse.studies.latentwire.evaluate import main as evaluate
from stillhouse.studies.latentwire.objective import LatentWireObjective
from stillhouse.studies.latentwire.results import load_evaluation
from stillhouse.studies.latentwire.train import TrainStep, main
from stillhouse.training.tracking import METRICS_FILE, read_metrics
from tests.latentwire.tiny_study import evaluation_step, make_data, questions, run_settings

TRAINING = {
    "steps": 6,
    "batch_size": 3,
    "save_every": 3,
    "resume_every": 2,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "schedule": {"warmup_steps": 0},
}
RUN: dict[str, Any] = {
    "losses": {"kd": 0.5},
    "teacher": {"targets": "online"},
    "curriculum": {"latent_dropout": 0.5},
    "diagnostics_every": 2,
    "training": TRAINING,
}
BYTES = {"layers": 1, "width": 16, "heads": 2}
OWN_MODEL = {"kind": "language_model", "lora": {"rank": 2, "dropout": 0.0}, "max_length": 512}
Step = Callable[..., TrainStep]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bit-equality is promised on the processor."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_families(folder)
    make_tiny_sentence_encoder(folder / "tiny_bert", positions=128)
    make_data(folder / "data")
    return folder


@pytest.fixture
def make_step(folder: Path, tmp_path: Path) -> Step:
    def make(name: str = "run", max_text_bytes: int | None = None, data: Path | None = None, **run: Any) -> TrainStep:
        return TrainStep(
            models=tuple(folder / family for family in FAMILIES),
            data=data or folder / "data",
            encoder=folder / "tiny_bert" if run.get("encoder", {}).get("kind") == "sentence" else None,
            output=tmp_path / name / "output",
            work=tmp_path / name / "work",
            names=FAMILIES,
            condition="latent",
            seed=1,
            run=run_settings(**RUN | run),
            max_text_bytes=max_text_bytes,
            tracking=TrackingSettings(),
            trust_remote_code=(False, False),
        )

    return make


def weights(step: TrainStep, number: int = 6) -> dict[str, torch.Tensor]:
    return load_file(step.output / f"checkpoint-{number}" / WEIGHTS)


def test_a_run_leaves_checkpoints_curves_diagnostics_and_a_record_of_itself(make_step):
    step = make_step()
    main(step)
    verify_manifest(step.output)
    assert {path.name for path in step.output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    rows = read_metrics(step.output / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "ce/llama", "kd/gemma", "first_token_accuracy/gemma"} <= rows[0].keys()
    assert rows[0]["units"] == TRAINING["batch_size"]
    assert [row.step for row in read_diagnostics(step.output / DIAGNOSTICS_FILE)] == [2, 4, 6]
    record = read_json(step.output / "run.json")
    assert record["settings"]["run"]["latent"]["length"] == 3
    assert record["examples"] == 6 and record["encoder_fit"]["cut"] == 0


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(make_step, monkeypatch):
    undisturbed, killed = make_step("undisturbed"), make_step("killed")
    main(undisturbed)
    original = LatentWireObjective.__call__

    def dying(self, model, micro_batch, step):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, model, micro_batch, step)

    monkeypatch.setattr(LatentWireObjective, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        main(killed)
    assert not killed.output.exists()
    monkeypatch.setattr(LatentWireObjective, "__call__", original)
    main(killed)
    assert read_json(killed.output / "run.json")["training"]["resumed_from"] == 4
    for number in (3, 6):
        one, other = weights(undisturbed, number), weights(killed, number)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    texts = [(step.output / DIAGNOSTICS_FILE).read_text() for step in (undisturbed, killed)]
    assert texts[0] == texts[1]


def test_training_changes_the_channel_and_never_the_readers(make_step, monkeypatch):
    built, channels = Channel.build, []

    def remembered(*arguments, **options):
        channels.append(built(*arguments, **options))
        before.update({name: value.clone() for name, value in channels[0].named_parameters()})
        return channels[0]

    before: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(Channel, "build", remembered)
    main(make_step(encoder=OWN_MODEL))
    changed = {name for name, value in channels[0].named_parameters() if not torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith("readers.") or ".base_layer." in name}
    assert not changed & frozen
    assert {name.partition(".")[0] for name in changed} == {"encoder", "adapters"}
    assert any("lora_B" in name for name in changed)


def test_a_sentence_encoder_is_trained_around_saved_without_and_named_for_the_evaluation(make_step, folder, tmp_path):
    sentence = {"kind": "sentence", "model": "tiny_bert", "width": 16, "heads": 2, "max_length": 128}
    step = make_step(encoder=sentence)
    main(step)
    assert not any(name.startswith("encoder.model.") for name in weights(step))
    assert {"encoder.projection.weight", "encoder.pooling.queries"} <= weights(step).keys()
    arms = {"arms": ["latent", "full_text"]}
    with pytest.raises(UserError, match=r"output: needs the sentence encoder 'tiny_bert': name it in encoders"):
        evaluate(evaluation_step(folder, tmp_path / "evaluation", [step.output], **arms))
    evaluate(evaluation_step(folder, tmp_path / "evaluation", [step.output], [folder / "tiny_bert"], **arms))
    results = load_evaluation(tmp_path / "evaluation" / "results.json").results
    assert [(one.encoder, one.cut_texts) for one in results.channels] == [("sentence", 0)]
    assert all(results.of("latent", reader) for reader in FAMILIES)


def test_recomputed_activations_give_the_same_weights(make_step):
    plain = make_step("plain", encoder=OWN_MODEL)
    frugal = make_step("frugal", encoder=OWN_MODEL, training=TRAINING | {"gradient_checkpointing": True})
    for step in (plain, frugal):
        main(step)
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(frugal)[name], rtol=1e-4, atol=1e-5)


def test_a_text_that_the_encoder_cannot_take_is_refused_before_training(make_step):
    with pytest.raises(UserError, match=r"encoder.max_length: \d of 6 train texts are longer than 80 bytes"):
        main(make_step(encoder=BYTES | {"max_length": 80}))
    step = make_step(encoder=BYTES | {"max_length": 120}, max_text_bytes=120)
    main(step)
    record = read_json(step.output / "run.json")
    assert record["left_out"] > 0 and record["examples"] + record["left_out"] == 6


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_text_that_only_evaluation_would_refuse_is_refused_before_training(make_step, tmp_path, split):
    data = make_data(tmp_path / "data")
    [long] = questions(1)
    write_records(data / f"{split}.jsonl", [replace(long, context=long.context * 40)])
    write_manifest(data)
    step = make_step(data=data, encoder=BYTES | {"max_length": 400})
    with pytest.raises(UserError, match=f"encoder.max_length: 1 of 1 {split} texts are longer than 400 bytes"):
        main(step)
    assert not list(step.work.rglob("checkpoint-*"))


def test_a_damaged_input_is_named(make_step, folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text((folder / "data" / "train.jsonl").read_text())
    write_manifest(data)
    (data / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"train.jsonl: has 3 bytes"):
        main(make_step(data=data))


def test_a_missing_cache_of_teachers_is_computed_in_the_step_only_where_asked(make_step, monkeypatch):
    assert train_module.teachers(make_step(losses={"ce": 1.0}), {}) == {}
    with pytest.raises(UserError, match="caches"):
        main(make_step(teacher={"targets": "cached"}))


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
def test_two_processes_train_the_channel_of_one(make_step: Step) -> None:
    """A batch of three splits unevenly; diagnostics are left to one of the two."""
    changes = {"curriculum": {"latent_dropout": 0.0}}
    one, two = make_step("one", **changes), make_step("two", **changes)
    main(one)
    run_step_in_two("stillhouse.studies.latentwire.train", two)
    # Attention's key biases have no gradient but rounding, of which Adam makes steps.
    torch.testing.assert_close(weights(two), weights(one), atol=1e-3, rtol=1e-3)
    alone, together = (read_metrics(step.output / METRICS_FILE) for step in (one, two))
    for key in ("loss", "ce/llama", "kd/gemma"):
        assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], rel=1e-4), key
    assert len(read_diagnostics(two.output / DIAGNOSTICS_FILE)) == 3
