"""The arms of a case: each is what its name says, none knows what is held out, and seconds contain all they should."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillhouse.models.lora_tensors import adapter_digest, read_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.lora_generation.arms import Collection, from_collection, generated, given
from stillhouse.studies.lora_generation.few_prompts import few_prompt_entries
from stillhouse.studies.lora_generation.generator_settings import GeneratorSettings, TextSettings, TokenSettings
from stillhouse.studies.lora_generation.generators import Generator, GeneratorPlan
from stillhouse.studies.lora_generation.manifest import AdapterRow, read_collection
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, read_prompts, read_solved_prompts
from stillhouse.studies.lora_generation.scoring import Scorer
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings, TeacherTrainingSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from tests.lora_generation.conftest import TinyStudy
from tests.lora_generation.tiny_collection import make_collection

SHARDS = ShardSettings(shards=4, validation_shards=1, held_out_shards=1)
READ = 3
HELD_OUT = ("numbers",)
LEARNT = {f"{task}/shard_{shard}-seed_42/step_10" for task in ("apples", "rivers") for shard in (0, 1)}
SECONDS = 0.02


class SlowEncoder(PromptEncoder):
    """Takes so long over prompts that seconds without them are told from seconds with them."""

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        time.sleep(SECONDS)
        return super()._embed(prompts)


def collection_of(study: TinyStudy, folder: Path, adapters: Path | None = None) -> Collection:
    encoder = SlowEncoder(study.encoder, TextSettings(), folder / "embeddings")
    return Collection(adapters or study.adapters, folder / "made", "tiny", SHARDS, encoder, READ, seed=42)


@pytest.fixture
def collection(tiny_study: TinyStudy, tmp_path: Path) -> Collection:
    return collection_of(tiny_study, tmp_path)


def generator_of(collection: Collection) -> Generator:
    """A generator as it begins: arms ask nothing of its training."""
    torch.manual_seed(0)
    plan = GeneratorPlan(
        generator=GeneratorSettings(prompts=READ, width=16, layers=1),
        tokens=TokenSettings(rows=2, columns=10),
        layout=read_adapter(collection.directory / collection.rows[0].name).layout,
        base_model="tiny",
        text_key=collection.encoder.key,
        vectors=1,
        width=16,
        guide=None,
    )
    return Generator(plan).eval()


def test_the_cases_are_the_teachers_of_held_out_shards_of_every_task(collection: Collection) -> None:
    names = [row.name for row in collection.cases]
    assert names == [f"{task}/shard_3-seed_42/step_10" for task in ("apples", "rivers", "numbers")]


def test_the_seconds_of_an_adapter_contain_the_embedding_of_its_prompts(collection: Collection) -> None:
    """Also where an earlier arm, condition or seed has read the same prompts."""
    generator, cases = generator_of(collection), collection.cases
    for seed in (1, 2):
        made = from_collection(collection, cases, HELD_OUT, ("nearest_adapter",))
        made += generated(collection, cases, generator, "multi_task", seed, "numbers")
        assert len(made) == 6
        assert all(entry.seconds is not None and entry.seconds >= SECONDS for entry in made)


def test_the_nearest_adapter_has_the_prompts_of_the_largest_cosine(collection: Collection) -> None:
    def direction(row: AdapterRow) -> Tensor:
        prompts = read_prompts(collection.directory / row.name / PROMPTS_FILE)[:READ]
        return torch.stack([collection.encoder.embed([prompt])[0, 0] for prompt in prompts]).mean(0)

    learnt = [row for row in collection.rows if row.name in LEARNT]
    found = from_collection(collection, collection.cases, HELD_OUT, ("nearest_adapter",))
    for case, entry in zip(collection.cases, found, strict=True):
        own = direction(case)
        cosines = {row.name: float(direction(row) @ own / direction(row).norm() / own.norm()) for row in learnt}
        assert entry.source == max(cosines, key=cosines.__getitem__)
        assert entry.folder == collection.directory / entry.source
    tasks = [str(entry.source).partition("/")[0] for entry in found]
    assert tasks[:2] == ["apples", "rivers"]


def test_the_mean_adapter_is_that_of_what_the_generator_learns_from(collection: Collection) -> None:
    entries = from_collection(collection, collection.cases, HELD_OUT, ("mean_adapter",))
    assert len({entry.folder for entry in entries}) == 1 and entries[0].folder is not None
    mean = read_adapter(entries[0].folder)
    learnt = [read_adapter(collection.directory / name) for name in sorted(LEARNT)]
    for module in mean.layout.modules:
        for matrix in ("a", "b"):
            total = sum(getattr(one, matrix)[module.name] for one in learnt)
            torch.testing.assert_close(getattr(mean, matrix)[module.name], total / len(learnt))


def test_the_adapter_of_another_task_is_learnt_from_and_drawn_by_the_seed(collection: Collection) -> None:
    found = from_collection(collection, collection.cases, HELD_OUT, ("other_task",))
    for case, entry in zip(collection.cases, found, strict=True):
        assert entry.source in LEARNT
        assert not str(entry.source).startswith(f"{case.task}/")
    again = from_collection(collection, collection.cases, HELD_OUT, ("other_task",))
    assert [entry.source for entry in again] == [entry.source for entry in found]


def test_in_context_examples_are_the_first_prompts_of_the_case_with_their_answers(collection: Collection) -> None:
    for case in collection.cases:
        prompts = read_solved_prompts(collection.directory / case.name / PROMPTS_FILE)
        assert given(collection, case, 2)["in_context"].shots == tuple(prompts[:2])
        every = given(collection, case, None)
        assert every["in_context"].shots == tuple(prompts[:READ]) and every["in_context"].folder is None
        assert (every["teacher"].source, every["teacher"].seconds) == (case.name, case.seconds)


def test_a_generated_adapter_is_what_the_generator_writes_for_the_prompts_of_the_case(collection: Collection) -> None:
    generator, cases = generator_of(collection), collection.cases
    entries = generated(collection, cases, generator, "multi_task", 7, "numbers")
    for case, entry in zip(cases, entries, strict=True):
        assert entry.folder is not None
        conditions = collection.encoder.embed([one.prompt for one in collection.solved(case)])
        with torch.no_grad():
            expected = generator(conditions[None]).adapter[0]
        assert adapter_digest(read_adapter(entry.folder)) == adapter_digest(expected)
        assert (entry.subject.task, entry.subject.shard, entry.subject.condition, entry.subject.seed) == (
            case.task,
            3,
            "multi_task",
            7,
        )
    assert len({entry.folder for entry in entries}) == len(cases)


def _with_other_answers(adapters: Path, place: int) -> Path:
    """The collection with another answer to one prompt of every adapter."""
    rows = [row.model_dump(mode="json") for row in read_collection(adapters)]
    for row in rows:
        path = adapters / row["name"] / PROMPTS_FILE
        content = json.loads(path.read_text())
        content["answers"][place] = " no"
        path.write_text(json.dumps(content))
    write_manifest(adapters, {"adapters": rows})
    return adapters


def test_a_lora_on_the_prompts_learns_just_those_that_the_generator_reads(
    tiny_study: TinyStudy, tmp_path: Path
) -> None:
    training = TeacherTrainingSettings.model_validate(
        {
            "steps": 2,
            "batch_size": 3,
            "learning_rate": 0.03,
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"warmup_steps": 0},
            "save_every": 2,
            "precision": "fp32",
        }
    )
    styles = dict.fromkeys(("apples", "rivers", "numbers"), "plain")
    digests = []
    for changed in (None, READ, 0):
        folder = tmp_path / str(changed)
        adapters = tiny_study.adapters
        if changed is not None:
            adapters = _with_other_answers(make_collection(folder / "adapters", tiny_study.model), changed)
        collection = collection_of(tiny_study, folder, adapters)
        scorer = Scorer(tiny_study.model, precision="fp32", batch_tokens=500, score="acc")
        entries = few_prompt_entries(collection, collection.cases, styles, scorer, training, "answer", folder / "work")
        digests.append([adapter_digest(read_adapter(entry.folder)) for entry in entries if entry.folder])
        assert all(entry.seconds and entry.seconds > 0 for entry in entries)
    first, beyond_those_read, among_those_read = digests
    assert first == beyond_those_read and len(set(first)) == 3
    assert all(own != other for own, other in zip(first, among_those_read, strict=True))


def test_too_few_prompts_of_a_case_are_named(tiny_study: TinyStudy, tmp_path: Path) -> None:
    shutil.copytree(tiny_study.adapters, tmp_path / "adapters")
    collection = collection_of(tiny_study, tmp_path, tmp_path / "adapters")
    case = collection.cases[0]
    path = collection.directory / case.name / PROMPTS_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: values[:1] for name, values in content.items()}))
    with pytest.raises(UserError, match=r"prompts\.json: has 1 prompts, generators read 3: raise teachers\.prompts"):
        collection.solved(case)
