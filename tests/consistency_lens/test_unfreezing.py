"""A part that learns later lies in the original's memory until then, and the run is that of a copy from the start."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import forked
from torch import Tensor

from stillhouse.runtime.commands import dotted_arguments
from stillhouse.studies.consistency_lens import model as lens_model
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.objective import LensObjective
from stillhouse.studies.consistency_lens.parts import own_parameters
from stillhouse.studies.consistency_lens.train import TrainStep, main
from stillhouse.training.tracking import read_metrics
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.tiny_lens import training_step

UNFROZEN_IN = 4
LATE = {"trained": True, "unfreezing": f"0, hold {UNFROZEN_IN - 1}s, linear to 1 over 2s"}
LATE_PARTS = ("decoder.base", "decoder.output_head", "encoder.base", "encoder.embeddings")
TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "micro_batch_tokens": 100,  # several micro-batches an update
    "learning_rate": 1e-2,
    "precision": "fp32",
    "save_every": 3,
    "resume_every": 1,
    "keep_resume_states": 6,
}

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")


def step_of(artefacts: Artefacts, folder: Path, late: Sequence[str] = LATE_PARTS, **changes: Any) -> TrainStep:
    """Six updates of a lens whose `late` parts are frozen in the first three."""
    lens: dict[str, Any] = {"layer": 1, "text_length": 3, "decoder": {}, "encoder": {"output_layer": 1}}
    for part in late:
        role, _, name = part.partition(".")
        lens[role][name] = LATE
    settings = {"lens": lens, "checkpoints": {"validation_items": 4}, "training": TRAINING}
    return training_step(artefacts, artefacts.activations, folder, **settings | changes)


@pytest.fixture(scope="module")
def undisturbed(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves."""
    step = step_of(artefacts, tmp_path_factory.mktemp("undisturbed"))
    main(step)
    return step.output


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take in memory; those that lie in the same place count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def parameters_of(lens: Lens, parts: Iterable[str]) -> dict[str, Tensor]:
    return {name: own for part in parts for name, own in lens.part_parameters()[part].items()}


def stands_for(lens: Lens, name: str) -> Tensor:
    """The original's parameter in whose place one of decoder or encoder stands."""
    return lens.original.get_parameter(name.partition(".base.")[2])


def saved_names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit the same weights, losses and validation losses."""
    ours, theirs = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (left, right))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (left, right)]
    for key in ("step", "loss", "gradient_norm", "validation/loss", "learning_rate/encoder.base"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]], key


def test_a_part_is_in_the_original_s_memory_until_the_update_that_unfreezes_it(
    artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(artefacts, tmp_path)
    never = Lens.build(step.model, step_of(artefacts, tmp_path, late=()).run.lens, "fp32", "cpu")
    weights = {name: value.clone() for name, value in never.original.named_parameters()}
    compute, memory, seen = LensObjective.__call__, {}, []

    def observe(self: LensObjective, lens: Any, micro_batch: Any, update: int) -> Any:
        late = parameters_of(lens, LATE_PARTS)
        shared = {own.data_ptr() == stands_for(lens, name).data_ptr() for name, own in late.items()}
        assert shared == {update < UNFROZEN_IN}
        assert {own.requires_grad for own in late.values()} == {update >= UNFROZEN_IN}
        memory[update] = bytes_of(lens.parameters())
        seen.append(lens)
        return compute(self, lens, micro_batch, update)

    monkeypatch.setattr(LensObjective, "__call__", observe)
    main(step)

    late = parameters_of(seen[-1], LATE_PARTS)
    assert [memory[update] for update in range(1, 7)] == (
        [bytes_of(never.parameters())] * 3 + [bytes_of(never.parameters()) + bytes_of(late.values())] * 3
    )
    # What was lent is as it was, though its borrowers have learnt.
    assert all(torch.equal(value, weights[name]) for name, value in seen[-1].original.named_parameters())
    assert not torch.equal(late["decoder.base.lm_head.weight"], weights["lm_head.weight"])

    [work] = step.work.iterdir()
    for update in range(1, 7):
        held = saved_names(work / f"state-{update}" / "state.safetensors")
        for name in late:
            assert (f"parameter/{name}" in held) is (update >= UNFROZEN_IN)
            assert (f"optimizer/{name}/exp_avg" in held) is (update >= UNFROZEN_IN)


def test_the_run_is_that_of_copies_from_the_start(
    artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = lens_model.load_model

    def load_aligned(*arguments: Any, **options: Any) -> Any:
        """As a copy lies in memory: a mapped file's weights begin elsewhere, and their sums are rounded otherwise."""
        model = load_model(*arguments, **options)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    monkeypatch.setattr(lens_model, "load_model", load_aligned)
    lent, copied = (step_of(artefacts, tmp_path / name) for name in ("lent", "copied"))
    main(lent)
    monkeypatch.setattr(lens_model, "own_parameters", lambda role, part, lent=False: own_parameters(role, part))
    main(copied)
    for step, held in ((lent, False), (copied, True)):
        names = saved_names(step.output / "checkpoint-3" / "model.safetensors")
        assert ("encoder.base.model.embed_tokens.weight" in names) is held
    assert_same_run(lent.output, copied.output)


def test_a_run_killed_before_in_and_after_the_unfreezing_is_the_undisturbed_one(
    artefacts: Artefacts, undisturbed: Path, tmp_path: Path
) -> None:
    step = step_of(artefacts, tmp_path)
    arguments = dotted_arguments(step.model_dump(mode="json"))
    for update in (UNFROZEN_IN - 1, UNFROZEN_IN, UNFROZEN_IN + 1, UNFROZEN_IN + 2):
        crash = forked.start("tests.consistency_lens.kill_in_training", update, *arguments).finish()
        assert crash.returncode == -signal.SIGKILL, crash.stderr
        [work] = step.work.iterdir()
        assert (work / f"state-{update - 1}").is_dir() and not (work / f"state-{update}").exists()
    main(step)
    assert json.loads((step.output / "run.json").read_text())["training"]["resumed_from"] == UNFROZEN_IN + 1
    assert_same_run(undisturbed, step.output)


def test_frozen_weights_in_bf16_are_fp32_once_they_learn_and_resume_so(artefacts: Artefacts, tmp_path: Path) -> None:
    half = {"training": TRAINING | {"precision": "bf16"}}
    whole, resumed = (step_of(artefacts, tmp_path / name, **half) for name in ("whole", "resumed"))
    main(whole)
    main(resumed)
    [work] = resumed.work.iterdir()
    for update in (UNFROZEN_IN + 1, UNFROZEN_IN + 2):
        shutil.rmtree(work / f"state-{update}")  # as a crash after the unfreezing leaves it
    state = load_file(work / f"state-{UNFROZEN_IN}" / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    main(resumed)
    assert json.loads((resumed.output / "run.json").read_text())["training"]["resumed_from"] == UNFROZEN_IN
    assert_same_run(resumed.output, whole.output)


@pytest.mark.slow
def test_two_processes_killed_as_they_unfreeze_end_as_two_undisturbed_ones(
    artefacts: Artefacts, tmp_path: Path
) -> None:
    quiet = {"schedules": {"noise": "0"}}  # each process draws noise of its own
    alone, whole, killed = (step_of(artefacts, tmp_path / name, **quiet) for name in ("alone", "whole", "killed"))
    main(alone)
    forked.run_step_in_two("stillhouse.studies.consistency_lens.train", whole)
    arguments = dotted_arguments(killed.model_dump(mode="json"))
    crashes = forked.start_two("tests.consistency_lens.kill_in_training", UNFROZEN_IN, *arguments)
    assert [crash.finish().returncode for crash in crashes] == [-signal.SIGKILL] * 2
    forked.run_step_in_two("stillhouse.studies.consistency_lens.train", killed)
    assert json.loads((killed.output / "run.json").read_text())["training"]["resumed_from"] == UNFROZEN_IN - 1
    assert_same_run(killed.output, whole.output)
    together, one = (load_file(step.output / "checkpoint-6" / "model.safetensors") for step in (whole, alone))
    torch.testing.assert_close(together, one, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_from_before_the_unfreezing_leaves_the_part_with_the_original(
    artefacts: Artefacts, undisturbed: Path, tmp_path: Path
) -> None:
    settings = step_of(artefacts, tmp_path).run.lens
    for saved, shared in ((3, True), (6, False)):
        checkpoint = undisturbed / f"checkpoint-{saved}"
        names = saved_names(checkpoint / "model.safetensors")
        lens = Lens.load(artefacts.model, checkpoint, settings, "fp32", "cpu")
        for name, own in parameters_of(lens, LATE_PARTS).items():
            assert (name not in names) is (own.data_ptr() == stands_for(lens, name).data_ptr()) is shared
        learnt = lens.get_parameter("decoder.base.lm_head.weight")
        assert torch.equal(learnt, stands_for(lens, "decoder.base.lm_head.weight")) is shared
        untouched = Lens.build(artefacts.model, settings, "fp32", "cpu").original
        assert all(torch.equal(own, untouched.get_parameter(name)) for name, own in lens.original.named_parameters())
