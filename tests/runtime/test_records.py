"""The fingerprint of a run: a state is continued by the same run alone, wherever its files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.config.base import StrictModel
from stillhouse.runtime import records
from stillhouse.runtime.files import write_manifest
from stillhouse.runtime.records import fingerprint


class Step(StrictModel):
    """A step program's command line."""

    data: Path
    output: Path
    seed: int = 42
    learning_rate: float = 1e-3


def data(folder: Path, text: str = "data") -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(text)
    write_manifest(folder)
    return folder


def of(step: Step, module: str = "stillhouse.studies.context_distillation.train") -> str:
    return fingerprint(module, step, {"data": step.data}, exclude={"data", "output"})


def test_another_place_of_the_same_data_and_output_is_the_same_run(tmp_path: Path) -> None:
    here = Step(data=data(tmp_path / "here"), output=tmp_path / "one")
    there = Step(data=data(tmp_path / "there"), output=tmp_path / "two")
    assert of(here) == of(there)


@pytest.mark.parametrize("change", [{"seed": 43}, {"learning_rate": 2e-3}])
def test_another_setting_or_seed_is_another_run(change: dict[str, float], tmp_path: Path) -> None:
    step = Step(data=data(tmp_path / "data"), output=tmp_path / "output")
    assert of(step) != of(step.model_copy(update=change))


def test_other_data_is_another_run(tmp_path: Path) -> None:
    one = Step(data=data(tmp_path / "one"), output=tmp_path / "output")
    assert of(one) != of(one.model_copy(update={"data": data(tmp_path / "two", "other data")}))


def test_other_code_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(data=data(tmp_path / "data"), output=tmp_path / "output")
    before = of(step)
    assert before != of(step, "stillhouse.studies.latentwire.train")
    changed = records.code_digests("stillhouse.studies.context_distillation.train") | {"stillhouse.training.loop": "0"}
    monkeypatch.setattr(records, "code_digests", lambda module: changed)
    assert before != of(step)
