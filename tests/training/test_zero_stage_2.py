"""`sharding: zero2` beside what defines it, DeepSpeed's ZeRO stage 2: memory of each of two processes, and weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import forked

from stillhouse.runtime.files import read_json

# One worker: a server that has imported torch forks their processes.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("programs")]


def trained(kind: str, folder: Path) -> Path:
    """What two processes leave."""
    folder.mkdir()
    done = [program.finish() for program in forked.start_two("tests.training.zero_stage_2", kind, folder)]
    assert [one.returncode for one in done] == [0, 0], done
    return folder


def shares(folder: Path) -> list[dict[str, float]]:
    """What each process holds, in parts of one copy of the weights."""
    held = [read_json(folder / f"{rank}.json") for rank in range(2)]
    return [{name: size / one["whole"] for name, size in one.items()} for one in held]


def test_each_of_two_processes_keeps_half_and_zero2_whole_weights_between_the_passes(tmp_path: Path) -> None:
    for kind, between in (("fsdp", 0.5), ("zero2", 1.0)):
        for held in shares(trained(kind, tmp_path / kind)):
            expected = {"weights": 0.5, "between passes": between, "gradients": 0.5, "moments": 1.0, "whole": 1.0}
            assert held == pytest.approx(expected, abs=0.01)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed, with which zero2 is compared, is not installed: DS_BUILD_OPS=0 pip install deepspeed==0.19.8",
)
def test_zero2_gives_the_weights_of_deepspeed_s_stage_2_and_needs_no_more_memory(tmp_path: Path) -> None:
    ours, theirs = (trained(kind, tmp_path / kind) for kind in ("zero2", "deepspeed"))
    weights = [load_file(folder / "weights.safetensors") for folder in (ours, theirs)]
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=0)
    for held, reference in zip(shares(ours), shares(theirs), strict=True):
        for name, part in held.items():
            assert part <= reference[name] + 0.01, name
