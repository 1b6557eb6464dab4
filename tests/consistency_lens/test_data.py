"""Tokens, positions, partners and batches of the lens."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from stillhouse.data.records import Passage, read_passages, write_records
from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.consistency_lens import tokens
from stillhouse.studies.consistency_lens.config import TokenSettings
from stillhouse.studies.consistency_lens.data import (
    ActivationData,
    CachedExamples,
    Shards,
    TokenExamples,
    choose_position,
    draw_partners,
)
from stillhouse.studies.consistency_lens.run_settings import PositionSettings
from stillhouse.studies.consistency_lens.shards import ShardContent, ShardPlan, build_shards, plan_shards
from stillhouse.studies.consistency_lens.tokens import TokensStep, without_duplicates
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.corpus import activation_settings, tokenise


@pytest.fixture
def cached(artefacts: Artefacts) -> CachedExamples:
    return CachedExamples(artefacts.activations, "train", activation_settings(), artefacts.model)


def test_shards_hold_each_document_once_as_the_tokenizer_reads_it(artefacts: Artefacts) -> None:
    tokenizer = load_tokenizer(artefacts.model)
    for split, count in {"train": 20, "validation": 6, "test": 8}.items():
        shards = Shards(artefacts.tokens, split)
        passages = read_passages(artefacts.data / f"{split}.jsonl")
        assert [shards.document_id(index) for index in range(count)] == [passage.id for passage in passages]
        for index, passage in enumerate(passages):
            assert shards.token_ids(index).tolist() == tokenizer(passage.text).input_ids[:64]
        assert shards.lengths().tolist() == [len(shards.token_ids(index)) for index in range(count)]
    assert len(list(artefacts.tokens.glob("train-*.safetensors"))) == 4


def test_no_document_stands_in_two_splits(artefacts: Artefacts) -> None:
    ids = {s: {Shards(artefacts.tokens, s).document_id(i) for i in range(6)} for s in ("train", "validation", "test")}
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["validation"]


def test_a_repeated_text_stays_in_the_held_out_split_alone() -> None:
    passages = {
        "train": [Passage("a", "same"), Passage("b", "own"), Passage("c", "own")],
        "validation": [Passage("d", "same"), Passage("e", "other")],
        "test": [Passage("f", "same")],
    }
    kept = without_duplicates(passages)
    assert {split: [passages[split][row].id for row in rows] for split, rows in kept.items()} == {
        "train": ["b"],
        "validation": ["e"],
        "test": ["f"],
    }


def test_tokenising_drops_repeated_texts_and_keeps_the_order(artefacts: Artefacts, tmp_path: Path) -> None:
    """As a set of all texts finds them."""
    texts = [f"Ada has {number % 23} apples and {number % 7} books" for number in range(300)]
    held_out = {"test": texts[5:20], "validation": texts[15:40]}
    (tmp_path / "data").mkdir()
    for split, own in {"train": texts, **held_out}.items():
        write_records(tmp_path / "data" / f"{split}.jsonl", (Passage(f"{split}-{n}", t) for n, t in enumerate(own)))
    write_manifest(tmp_path / "data")
    tokenised = tokenise(artefacts.model, tmp_path / "data", tmp_path / "tokens")
    tokenizer = load_tokenizer(artefacts.model)
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        expected = []
        for passage in read_passages(tmp_path / "data" / f"{split}.jsonl"):
            if passage.text not in seen:
                expected.append((passage.id, tokenizer(passage.text).input_ids[:64]))
            seen.add(passage.text)
        shards = Shards(tokenised, split)
        assert [(shards.document_id(n), shards.token_ids(n).tolist()) for n in range(len(shards))] == expected
    assert read_json(tokenised / "run.json")["duplicates"] == {"train": 300 - 161 + 35, "validation": 5, "test": 0}


def test_tokenising_holds_the_text_of_one_shard(artefacts: Artefacts, tmp_path: Path) -> None:
    def most_memory(name: str, sizes: dict[str, int], letters: int) -> int:
        data = tmp_path / name / "data"
        data.mkdir(parents=True)
        for split, count in sizes.items():
            passages = (Passage(f"{split}-{n}", f"{split} {n} " + "apple " * (letters // 6)) for n in range(count))
            write_records(data / f"{split}.jsonl", passages)
        write_manifest(data)
        step = TokensStep(
            model=artefacts.model,
            data=data,
            output=tmp_path / name / "tokens",
            work=tmp_path / name / "work",
            tokens=TokenSettings(max_length=16, shard_documents=50),
        )
        tracemalloc.start()
        tokens.main(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    alone = most_memory("small", {"train": 4, "validation": 2, "test": 2}, 60)
    # 8 MB of text, 0.4 MB a shard.
    assert most_memory("large", {"train": 800, "validation": 100, "test": 100}, 8000) - alone < 2_000_000


def test_tokenising_again_gives_the_same_bytes(artefacts: Artefacts, tmp_path: Path) -> None:
    again = tokenise(artefacts.model, artefacts.data, tmp_path / "tokens")
    assert read_json(again / "manifest.json") == read_json(artefacts.tokens / "manifest.json")


@pytest.mark.parametrize("length", [5, 6, 7, 40])
def test_the_midpoint_lies_half_way_between_the_minimum_and_the_last_token(length: int) -> None:
    positions = PositionSettings(policy="midpoint", minimum=3)
    assert choose_position(length, positions, "any") == (3 + length - 1) // 2


def test_random_positions_reach_from_the_minimum_to_the_last_token_but_one() -> None:
    positions = PositionSettings(policy="random", minimum=3)
    drawn = [choose_position(8, positions, f"document {number}") for number in range(400)]
    assert set(drawn) == {3, 4, 5, 6}
    assert all(drawn.count(value) > 60 for value in set(drawn))
    assert drawn == [choose_position(8, positions, f"document {number}") for number in range(400)]
    other = PositionSettings(policy="random", minimum=3, seed=1)
    assert drawn != [choose_position(8, other, f"document {number}") for number in range(400)]


def test_on_the_fly_examples_are_the_cached_ones_without_activations(
    artefacts: Artefacts, cached: CachedExamples
) -> None:
    fresh = TokenExamples(artefacts.tokens, "train", activation_settings(), artefacts.model)
    assert len(fresh) == len(cached)
    for index in range(len(cached)):
        ours, theirs = fresh[index], cached[index]
        assert (ours.document_id, ours.position) == (theirs.document_id, theirs.position)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.activation is None and theirs.activation is not None


def test_partners_are_other_documents_and_fixed_by_the_seed() -> None:
    partners = draw_partners(50, seed=3)
    assert sorted(partners) == list(range(50))
    assert all(index != partner for index, partner in enumerate(partners))
    assert partners == draw_partners(50, seed=3) != draw_partners(50, seed=4)
    with pytest.raises(UserError, match="at least two documents"):
        draw_partners(1, seed=3)


def test_batches_hold_each_document_up_to_its_token(cached: CachedExamples) -> None:
    data = ActivationData(cached, seed=5)
    [batch] = data.micro_batches([4, 1, 9], token_budget=10_000)
    for row, index in enumerate([4, 1, 9]):
        for example, ids, mask, position, activation in (
            (
                cached[index],
                batch.input_ids[row],
                batch.attention_mask[row],
                batch.positions[row],
                batch.activations[row],  # type: ignore[index]
            ),
            (
                cached[data.partners[index]],
                batch.other_input_ids[row],
                batch.other_attention_mask[row],
                batch.other_positions[row],
                batch.other_activations[row],  # type: ignore[index]
            ),
        ):
            seen = example.position + 1
            assert position == example.position and mask.sum() == seen and mask[:seen].all()
            assert ids[:seen].tolist() == example.token_ids[:seen].tolist()
            torch.testing.assert_close(activation, example.activation, atol=0, rtol=0)
    assert batch.tokens == int(batch.attention_mask.sum() + batch.other_attention_mask.sum())


def test_micro_batches_keep_the_budget_and_the_order(cached: CachedExamples) -> None:
    data = ActivationData(cached, seed=5)
    batches = list(data.micro_batches(range(20), token_budget=160))
    assert len(batches) > 2
    sizes = [
        max(batch.input_ids.shape[1], batch.other_input_ids.shape[1]) * 2 * len(batch.positions) for batch in batches
    ]
    assert all(size <= 160 or len(batch.positions) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert torch.cat([batch.positions for batch in batches]).tolist() == [cached[index].position for index in range(20)]
    alone = list(data.micro_batches(range(3), token_budget=1))
    assert [len(batch.positions) for batch in alone] == [1, 1, 1]


def test_reading_one_example_touches_its_shard_alone(cached: CachedExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    from stillhouse.studies.consistency_lens import shards

    monkeypatch.setattr(
        shards, "safe_open", lambda path, framework: opened.append(path.name) or safe_open(path, framework)
    )
    assert cached[13].document_id == "train-13"
    assert opened == ["train-00002.safetensors"]


def private_bytes() -> int:
    """Memory of the running process without the files that it maps."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def test_readers_map_a_corpus_and_never_hold_it(tmp_path: Path) -> None:
    """64 MiB of activations in 16 shards, a row of each sixteenth document read."""
    plans, activations = plan_shards({"train": 4096}, 256), torch.ones(256, 4096)

    def content(plan: ShardPlan) -> ShardContent:
        return ShardContent([str(row) for row in plan.rows], [torch.zeros(2)] * 256, {"activations": activations})

    build_shards(tmp_path, plans, content)
    write_manifest(tmp_path, {"facts": {}, "splits": {"train": {plan.name: len(plan.rows) for plan in plans}}})
    before = private_bytes()
    shards = Shards(tmp_path, "train")
    assert sum(float(shards.row("activations", index).mean()) for index in range(0, len(shards), 16)) == 256
    assert private_bytes() - before < 2**23


def test_the_mean_over_shards_is_the_mean_over_documents(cached: CachedExamples) -> None:
    rows = torch.stack([cached[index].activation for index in range(20)])  # type: ignore[misc]
    torch.testing.assert_close(cached.shards.mean("activations"), rows.double().mean(0))
