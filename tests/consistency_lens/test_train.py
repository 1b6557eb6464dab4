"""Training a lens: resumes bit-exactly, unfreezes in time, and keeps what it was asked to keep."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import forked

from stillhouse.config.training import TrackingSettings
from stillhouse.runtime.commands import dotted_arguments
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest
from stillhouse.studies.consistency_lens import activations
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.run_settings import RunSettings
from stillhouse.studies.consistency_lens.train import TrainStep, keep_checkpoints, main
from stillhouse.training.tracking import read_metrics
from tests.consistency_lens.corpus import activation_settings, extraction_step, make_corpus, tokenise

RUN: dict[str, Any] = {
    "positions": {"policy": "random", "minimum": 3},
    "max_length": 32,
    "lens": {"layer": 1, "text_length": 3, "encoder": {"prompt_text": "so <text>", "output_layer": 1}},
    "schedules": {"learning_rate": "0, linear to 1 over 2s", "temperature": "1, cosine to 0.5 over 1e"},
    "checkpoints": {"validation_items": 4},
    "training": {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_tokens": 200,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "save_every": 2,
        "resume_every": 2,
    },
}

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")


@pytest.fixture(scope="module")
def corpus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `tokens` and `activations` of the tiny model."""
    folder = tmp_path_factory.mktemp("corpus")
    tokens = tokenise(tiny_model, make_corpus(folder / "data"), folder / "tokens")
    activations.main(extraction_step(tiny_model, tokens, folder / "activations"))
    return folder


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def train_step(model: Path, corpus: Path, folder: Path, **changes: Any) -> TrainStep:
    return TrainStep(
        model=model,
        activations=corpus / "activations",
        tokens=corpus / "tokens",
        output=folder / "output",
        work=folder / "work",
        condition="lens",
        seed=1,
        run=RunSettings.model_validate(merged(RUN, changes)),
        tracking=TrackingSettings(),
        trust_remote_code=False,
    )


def weights(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "output" / f"checkpoint-{step}" / "model.safetensors")


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_leaves_checkpoints_metrics_and_a_record(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    step = train_step(tiny_model, corpus, tmp_path)
    main(step)
    assert verify_manifest(step.output)
    assert sorted(path.name for path in step.output.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    rows = read_metrics(step.output / "metrics.jsonl")
    terms = {"reconstruction_kl", "resample_kl", "language_model", "entropy", "mse"}
    assert all(
        {"loss", "temperature", "alpha", "learning_rate/decoder.projection", *terms} <= row.keys() for row in rows
    )
    validated = [row["step"] for row in rows if "validation/loss" in row]
    assert validated == [2, 4, 6]
    assert [row["learning_rate/encoder.projection"] for row in rows[:3]] == [0.005, 0.01, 0.01]
    record = json.loads((step.output / "run.json").read_text())
    assert record["examples"] == 20 and record["checkpoints"] == [2, 4, 6]
    lens = Lens.load(tiny_model, step.output / "checkpoint-6", step.run.lens, "fp32", "cpu")
    assert not torch.equal(lens.decoder.projection.weight, torch.eye(32))


def test_losses_fall_on_the_documents_it_learns_from_and_on_others(
    tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    step = train_step(tiny_model, corpus, tmp_path, training={"steps": 30, "save_every": 5})
    main(step)
    rows = read_metrics(step.output / "metrics.jsonl")
    for term in ("loss", "reconstruction_kl", "resample_kl"):
        learnt = [row[term] for row in rows]
        assert sum(learnt[-5:]) < 0.9 * sum(learnt[:5]), term
        held_out = [row[f"validation/{term}"] for row in rows if f"validation/{term}" in row]
        assert held_out[-1] < held_out[0], term


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    main(train_step(tiny_model, corpus, undisturbed))
    step = train_step(tiny_model, corpus, killed)
    arguments = dotted_arguments(step.model_dump(mode="json"))
    crash = forked.start("tests.consistency_lens.kill_in_training", 5, *arguments).finish()
    assert crash.returncode == -signal.SIGKILL, crash.stderr
    assert not step.output.exists()
    main(step)
    assert json.loads((step.output / "run.json").read_text())["training"]["resumed_from"] == 4
    assert_bit_equal(weights(killed), weights(undisturbed))
    rows = [read_metrics(folder / "output" / "metrics.jsonl") for folder in (killed, undisturbed)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row.get("validation/loss") for row in rows[0]] == [row.get("validation/loss") for row in rows[1]]


def test_cached_activations_and_those_of_the_step_train_the_same_lens(
    tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    for source in ("cached", "on_the_fly"):
        main(train_step(tiny_model, corpus, tmp_path / source, activations=source))
    torch.testing.assert_close(weights(tmp_path / "on_the_fly"), weights(tmp_path / "cached"), atol=1e-4, rtol=1e-3)


def test_a_part_is_frozen_until_its_epoch_and_then_warms_up(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    # An epoch is 5 steps of 4.
    late = {"trained": True, "learning_rate_multiplier": 0.5, "unfreezing": "0, hold 1e, linear to 1 over 2s"}
    step = train_step(
        tiny_model, corpus, tmp_path,
        lens={"encoder": {"base": late}}, training={"steps": 8},
    )  # fmt: skip
    main(step)
    rows = read_metrics(step.output / "metrics.jsonl")
    assert [row["learning_rate/encoder.base"] for row in rows] == [0, 0, 0, 0, 0, 0.0025, 0.005, 0.005]
    untouched = Lens.build(tiny_model, step.run.lens, "fp32", "cpu").part_parameters()["encoder.base"]
    # Blocks after the output layer never learn; the first one does once it is unfrozen.
    name = "encoder.base.model.layers.0.mlp.up_proj.weight"
    assert name not in weights(tmp_path, 4)
    assert not torch.equal(weights(tmp_path, 8)[name], untouched[name])


@pytest.mark.slow
def test_two_processes_train_the_lens_of_one(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    """A batch of five splits unevenly, a part thaws on the way, and validation is left to one of the two."""
    late = {"trained": True, "unfreezing": "0, hold 3s, linear to 1 over 2s"}
    changes = {
        "lens": {"encoder": {"base": late}},
        "schedules": {"noise": "0"},  # each process draws noise of its own
        "training": {"batch_size": 5, "save_every": 3},
    }
    main(train_step(tiny_model, corpus, tmp_path / "one", **changes))
    step = train_step(tiny_model, corpus, tmp_path / "two", **changes)
    forked.run_step_in_two("stillhouse.studies.consistency_lens.train", step)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=1e-4, rtol=1e-3)
    alone, together = (read_metrics(tmp_path / name / "output" / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "validation/loss", "learning_rate/encoder.base"):
        assert [row.get(key) for row in together] == pytest.approx([row.get(key) for row in alone], rel=1e-4), key


def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}
    rows = [{"step": step, "validation/loss": loss} for step, loss in losses.items()]

    def kept(**settings: Any) -> list[int]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in losses:
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        run = RunSettings.model_validate({"checkpoints": settings})
        steps = keep_checkpoints(tmp_path, run.checkpoints, tuple(losses))
        assert steps == sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
        return steps

    assert kept(best=2, last=1) == [2, 3, 5]
    assert kept(best=1) == [2]
    assert kept(last=2) == [4, 5]
    assert kept() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens": {"layer": 2}}, "is of layer 1 .* but this run explains layer 2"),
        ({"positions": {"policy": "midpoint"}}, "is of positions .* but this run explains positions"),
        ({"max_length": 64, "positions": {"minimum": 60}, "activations": "on_the_fly"}, r"has \d+\): lower positions"),
        ({"lens": {"encoder": {"output_layer": 9}}}, r"lens.encoder.output_layer: 9 is out of range"),
        ({"lens": {"layer": 9}, "activations": "on_the_fly"}, r"lens.layer: 9 is out of range"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(
    tiny_model: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        main(train_step(tiny_model, corpus, tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


def test_the_extraction_of_the_run_is_the_one_in_the_corpus() -> None:
    assert RunSettings.model_validate(RUN).extraction == activation_settings()
