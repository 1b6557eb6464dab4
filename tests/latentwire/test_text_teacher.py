"""The text teacher: a cache equals the forward pass in the step, and survives neither damage nor other data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.data import WireData, read_examples
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import CacheSettings, RunSettings
from stillhouse.studies.latentwire.text_teacher import CachedTeacher, OnlineTeacher, TextTeacherStep, main
from tests.latentwire.tiny_readers import FAMILIES, make_families
from tests.latentwire.tiny_study import load_readers, make_data, run_settings

PROJECT = tuple[Path, dict[str, Reader], WireData]


def cached_run(**changes: object) -> RunSettings:
    return run_settings(losses={"kd": 1.0}, teacher={"batch_tokens": 64}, **changes)


def build(folder: Path, name: str, cache: CacheSettings, output: Path) -> Path:
    step = TextTeacherStep(
        model=folder / name, data=folder / "data", output=output, work=folder / "work", name=name, cache=cache
    )
    main(step)
    return output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> PROJECT:
    """A folder with models, data and one cache a reader; the readers; and all training examples as data."""
    folder = tmp_path_factory.mktemp("project")
    run = cached_run()
    readers = load_readers(make_families(folder), run)
    make_data(folder / "data")
    examples = read_examples(folder / "data" / "train.jsonl").examples
    assert run.cache
    for name in FAMILIES:
        build(folder, name, run.cache, folder / "cache" / name)
    return folder, readers, WireData(examples, {name: reader.answer_ids for name, reader in readers.items()})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_holds_what_the_plain_model_predicts_for_every_answer_token(project: PROJECT, name: str) -> None:
    folder, readers, data = project
    reader, batch = readers[name], data.batch([4, 0, 3])
    hidden = CachedTeacher(folder / "cache" / name, reader).hidden(batch)
    logits, row = reader.model.get_output_embeddings()(hidden), 0
    for text, example in zip(batch.texts, (4, 0, 3), strict=True):
        prompt, answer = reader.text_prompt(text), reader.answer_ids(data.examples[example].answer)
        with torch.no_grad():
            whole = reader.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        expected = whole[len(prompt) - 1 : -1]
        assert torch.allclose(logits[row : row + len(answer)], expected, rtol=1e-3, atol=1e-3)
        row += len(answer)
    assert row == len(hidden) == batch.targets[name].tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_equals_the_teacher_in_the_step(project: PROJECT, name: str) -> None:
    folder, readers, data = project
    batch = data.batch([1, 5, 2])
    cached = CachedTeacher(folder / "cache" / name, readers[name]).hidden(batch)
    online = OnlineTeacher(readers[name], batch_tokens=10_000).hidden(batch)
    assert torch.allclose(cached, online, rtol=1e-3, atol=1e-4)
    assert not online.requires_grad


def test_a_cache_that_is_made_again_has_the_same_targets(project: PROJECT, tmp_path: Path) -> None:
    folder, _, _ = project
    cache = cached_run().cache
    assert cache
    again = build(folder, "gemma", cache, tmp_path / "again")
    assert (again / "manifest.json").read_bytes() == (folder / "cache" / "gemma" / "manifest.json").read_bytes()


def test_a_cache_of_another_reader_or_other_answers_is_refused(project: PROJECT) -> None:
    folder, readers, data = project
    with pytest.raises(UserError, match=r"cache/llama: is no text teacher of gemma"):
        CachedTeacher(folder / "cache" / "llama", readers["gemma"])
    teacher = CachedTeacher(folder / "cache" / "llama", readers["llama"])
    others = WireData(data.examples, {"llama": lambda answer: readers["llama"].answer_ids(f"{answer} x")})
    with pytest.raises(UserError, match=r"cache/llama: holds other answers"):
        teacher.hidden(others.batch([0]))


def test_a_damaged_cache_is_named(project: PROJECT, tmp_path: Path) -> None:
    folder, readers, _ = project
    cache = cached_run().cache
    assert cache
    directory = build(folder, "llama", cache, tmp_path / "damaged")
    shard = next(directory.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: has \d+ bytes"):
        CachedTeacher(directory, readers["llama"])
