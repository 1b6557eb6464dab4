"""Trackers: refused where absent, told their run's id, and told the same one after a resume."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from stillhouse.config.training import TrackingSettings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger
from stillhouse.training.processes import TrainingInterrupted
from stillhouse.training.tracking import flat, log_table, new_run_id, tracker_arguments
from tests.runtime.test_device_usage import FakeNvml
from tests.training.tiny_run import AnswerCrossEntropy, tiny_settings, tiny_train


def test_a_missing_tracker_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    if "wandb" in sys.modules or LoggerType.WANDB in accelerate.tracking.get_available_trackers():
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match="'wandb' is not installed: pip install wandb"):
        tiny_train(tiny_model, tmp_path, tiny_settings(), tracking=TrackingSettings(trackers=("wandb",)))
    assert not (tmp_path / "work").exists()


class FakeWandb:
    """Records what the trainer asks of W&B."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: dict[int | None, dict[str, Any]] = {}
        self.configuration: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda values, **options: self.configuration.update(values))

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.runs.append(arguments)
        return SimpleNamespace(log=self.log, finish=lambda: None, config=self.config)

    def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
        self.logged[step] = values

    @staticmethod
    def Table(columns: list[str], data: list[list[str]], dataframe: object) -> tuple[list[str], list[list[str]]]:  # noqa: N802
        return columns, data


def install(monkeypatch: pytest.MonkeyPatch, tracker: LoggerType, package: Any) -> None:
    """Let accelerate find `package` as the one of a tracker."""
    monkeypatch.setitem(sys.modules, tracker.value, package)
    available = [*accelerate.tracking.get_available_trackers(), tracker]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", available)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    install(monkeypatch, LoggerType.WANDB, fake)
    return fake


def test_wandb_keeps_its_run_over_a_resume(tiny_model: Path, tmp_path: Path, wandb: FakeWandb) -> None:
    options: dict[str, Any] = {
        "tracking": TrackingSettings(trackers=("wandb",), project="distillation"),
        "run_name": "baseline",
    }
    with pytest.raises(TrainingInterrupted):
        tiny_train(tiny_model, tmp_path, tiny_settings(), AnswerCrossEntropy(3, signal.SIGTERM), **options)
    tiny_train(tiny_model, tmp_path, tiny_settings(), **options)

    first, second = wandb.runs
    assert first == second
    assert first["project"] == "distillation" and first["name"] == "baseline"
    assert first["resume"] == "allow" and len(first["id"]) == 32
    assert list(wandb.logged) == list(range(1, 9))


def test_a_tracker_is_told_the_slurm_job_and_what_its_gpus_do(
    tiny_model: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (("SLURM_JOB_ID", "17"), ("SLURMD_NODENAME", "node3")):
        monkeypatch.setenv(name, value)
    tiny_train(tiny_model, tmp_path, tiny_settings(), tracking=TrackingSettings(trackers=("wandb",)))
    told = {"scheduler.slurm_job_id": "17", "scheduler.node": "node3"}
    assert wandb.configuration.items() >= told.items()
    usage = {"gpu0/utilisation_percent": 50, "gpu0/temperature_celsius": 60, "gpu1/memory_mib": 2048.0}
    assert wandb.logged[8].items() >= usage.items()


def test_a_table_reaches_the_trackers_that_take_tables_and_the_others_are_named(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live = SimpleNamespace(end=lambda: None)
    install(monkeypatch, LoggerType.DVCLIVE, SimpleNamespace(Live=lambda **options: live))
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    settings = TrackingSettings(trackers=("wandb", "dvclive"), project="lens")
    log_table(settings, tmp_path, "tiny-evaluation", "samples", ["token", "text"], [["a", "b|c"], ["d", "e"]])
    [run] = wandb.runs
    assert (run["project"], run["name"]) == ("lens", "tiny-evaluation")
    assert list(wandb.logged.values()) == [{"samples": (["token", "text"], [["a", "b|c"], ["d", "e"]])}]
    assert "dvclive takes no tables: 'samples' is not sent there" in caplog.text
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_every_tracker_of_the_configuration_can_be_continued() -> None:
    from typing import get_args

    [names, _] = get_args(TrackingSettings.model_fields["trackers"].annotation)
    for name in get_args(names):
        run_id = new_run_id(name) or "chosen-by-the-server"
        arguments = tracker_arguments(name, run_id, "baseline", Path("work"))
        assert run_id in arguments.values() or "resume" in arguments, name


def test_nested_settings_become_plain_dotted_values() -> None:
    assert flat({"lora": {"rank": 4, "target_modules": ["q_proj"]}, "packing": True}) == {
        "lora.rank": 4,
        "lora.target_modules": "['q_proj']",
        "packing": True,
    }
