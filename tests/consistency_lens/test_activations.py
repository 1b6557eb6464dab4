"""Extraction: what it writes, in how many processes, after which crash; and what it refuses."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from support import forked
from transformers import AutoModelForCausalLM

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json
from stillhouse.studies.consistency_lens import activations
from stillhouse.studies.consistency_lens.data import CachedExamples, TokenExamples
from stillhouse.studies.consistency_lens.run_settings import PositionSettings
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.corpus import activation_settings, extraction_step, make_corpus, tokenise

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")


def files_of(directory: Path) -> dict[str, str]:
    """The digests of an artefact's shards."""
    return {name: facts["sha256"] for name, facts in read_json(directory / "manifest.json")["files"].items()}


def at_work(pid: str) -> bool:
    """Whether a process runs; one that has ended may stay in the table until somebody asks for its status."""
    try:
        return " Z " not in Path("/proc", pid, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def extract_in_a_process(step: activations.ActivationsStep, folder: Path, *arguments: str) -> int:
    """Run the extraction as a program; returns its status."""
    folder.mkdir(exist_ok=True)
    (folder / "step.json").write_text(step.model_dump_json())
    return forked.start("tests.consistency_lens.corpus", folder / "step.json", *arguments).finish().returncode


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activations_are_the_residual_stream_of_one_plain_pass_over_the_whole_document(
    artefacts: Artefacts, tmp_path: Path, layer: int
) -> None:
    settings = activation_settings(layer=layer)
    activations.main(extraction_step(artefacts.model, artefacts.tokens, tmp_path / "a", activations=settings))
    model = AutoModelForCausalLM.from_pretrained(artefacts.model, dtype=torch.float32).eval()
    # hidden_states[-1] is after the final norm: the last block's own output is taken by a hook.
    last: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    examples = CachedExamples(tmp_path / "a", "train", settings, artefacts.model)
    for index in range(len(examples)):
        example = examples[index]
        assert example.activation is not None
        states = model(example.token_ids[None], output_hidden_states=True).hidden_states
        expected = (last[-1] if layer == 2 else states[layer])[0, example.position]
        torch.testing.assert_close(example.activation, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_write_the_shards_of_one(artefacts: Artefacts, tmp_path: Path) -> None:
    step = extraction_step(artefacts.model, artefacts.tokens, tmp_path / "two", processes=2)
    assert extract_in_a_process(step, tmp_path) == 0
    assert files_of(tmp_path / "two") == files_of(artefacts.activations)


@pytest.mark.slow
def test_extraction_goes_on_after_kill_9(artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = extraction_step(artefacts.model, artefacts.tokens, tmp_path / "killed")
    assert extract_in_a_process(step, tmp_path, "--kill-after", "3") == -9
    assert not step.output.exists()
    kept = sorted(path.name for path in step.work.rglob("*.safetensors"))
    assert len(kept) == 3
    computed = []
    extract = activations.extract_activations
    monkeypatch.setattr(
        activations, "extract_activations", lambda *arguments: computed.append(arguments) or extract(*arguments)
    )
    activations.main(step)
    assert files_of(step.output) == files_of(artefacts.activations)
    assert len(computed) == len(files_of(step.output)) - 3


@pytest.mark.slow
def test_killed_in_parallel_it_leaves_no_process_at_work_and_goes_on(artefacts: Artefacts, tmp_path: Path) -> None:
    step = extraction_step(artefacts.model, artefacts.tokens, tmp_path / "killed", processes=2)
    assert extract_in_a_process(step, tmp_path, "--kill-after", "1") == -9
    workers = [path.stem for path in tmp_path.glob("*.pid")]
    deadline = time.monotonic() + 120
    while any(map(at_work, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(at_work, workers))
    assert not step.output.exists()
    kept = {path: path.stat().st_mtime_ns for path in step.work.rglob("*.safetensors")}
    # Each of the two may finish the shard that it was at, and no further one; alone they would have written seven.
    assert 2 <= len(kept) <= 4
    activations.main(step.model_copy(update={"processes": 1}))
    assert files_of(step.output) == files_of(artefacts.activations)
    for path, time_written in kept.items():
        assert (step.output / path.name).stat().st_mtime_ns == time_written


def test_another_position_policy_does_not_go_on_from_the_shards_of_this_one(
    artefacts: Artefacts, tmp_path: Path
) -> None:
    step = extraction_step(artefacts.model, artefacts.tokens, tmp_path / "a")
    other = step.model_copy(
        update={"activations": activation_settings(positions=PositionSettings(policy="midpoint", minimum=3))}
    )
    activations.main(step)
    activations.main(other)
    assert files_of(other.output) != files_of(artefacts.activations)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_corrupt_shard_is_named_and_refused(artefacts: Artefacts, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(artefacts.activations, tmp_path / "copy")
    shard = copy / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    else:
        content[-3] ^= 1
        shard.write_bytes(content if damage == "flipped" else content[:-8])
    with pytest.raises(UserError, match=r"train-00001\.safetensors: (is corrupt|has \d+ bytes|is missing).*again"):
        CachedExamples(copy, "train", activation_settings(), artefacts.model)
    assert len(CachedExamples(copy, "test", activation_settings(), artefacts.model)) == 8


def test_activations_of_another_layer_or_model_are_refused(artefacts: Artefacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"activations: is of layer 1 .* this run explains layer 2 .*correct"):
        CachedExamples(artefacts.activations, "train", activation_settings(layer=2), artefacts.model)
    midpoint = activation_settings(positions=PositionSettings(policy="midpoint", minimum=3))
    with pytest.raises(UserError, match=r"is of positions .*random.* this run explains positions .*midpoint"):
        CachedExamples(artefacts.activations, "train", midpoint, artefacts.model)
    other = shutil.copytree(artefacts.model, tmp_path / "other")
    (other / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=r"\(model tiny\), but this run explains .*\(model other\)"):
        CachedExamples(artefacts.activations, "train", activation_settings(), other)
    with pytest.raises(UserError, match=r"tokens: is of model_digest"):
        TokenExamples(artefacts.tokens, "train", activation_settings(), other)


def test_a_layer_that_the_model_does_not_have_is_refused(artefacts: Artefacts, tmp_path: Path) -> None:
    step = extraction_step(artefacts.model, artefacts.tokens, tmp_path / "a", activations=activation_settings(layer=3))
    with pytest.raises(UserError, match=r"layer: 3 is out of range: the model has layers 0 \(embeddings\) to 2"):
        activations.main(step)


def test_a_corpus_shorter_than_the_position_limit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "data", longest=8)
    tokens = tokenise(tiny_model, data, tmp_path / "tokens")
    settings = activation_settings(positions=PositionSettings(policy="random", minimum=50), max_length=64)
    step = extraction_step(tiny_model, tokens, tmp_path / "a", activations=settings)
    with pytest.raises(
        UserError, match=r"no document of split 'train' has the 52 tokens that positions.minimum \(50\)"
    ):
        activations.main(step)


def test_the_record_counts_documents_that_are_too_short(artefacts: Artefacts, tmp_path: Path) -> None:
    settings = activation_settings(positions=PositionSettings(policy="random", minimum=20))
    activations.main(extraction_step(artefacts.model, artefacts.tokens, tmp_path / "a", activations=settings))
    record = read_json(tmp_path / "a" / "run.json")
    assert record["documents"]["train"] + record["too_short"]["train"] == 20
    assert record["too_short"]["train"] > 0


def test_bfloat16_activations_take_half_the_space_and_round_alone(artefacts: Artefacts, tmp_path: Path) -> None:
    settings = activation_settings(dtype="bfloat16")
    activations.main(extraction_step(artefacts.model, artefacts.tokens, tmp_path / "a", activations=settings))
    rounded = CachedExamples(tmp_path / "a", "test", settings, artefacts.model)[2].activation
    exact = CachedExamples(artefacts.activations, "test", activation_settings(), artefacts.model)[2].activation
    assert rounded is not None and exact is not None
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact.bfloat16().float(), atol=0, rtol=0)
