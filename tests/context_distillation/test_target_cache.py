"""The teacher cache gives back what was put in, survives kill -9, and names a damaged file."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from stillhouse.config.base import StrictModel
from stillhouse.models.output_head import OutputHead
from stillhouse.models.target_cache import CacheFacts, TargetCache, TeacherTargets, compute_shards, publish_cache
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.records import RunRecord

VOCABULARY, HIDDEN, TOP_K = 50, 8, 5
PLAN = [["a", "b"], ["c"], ["d", "e"]]
FACTS = CacheFacts("top_k", VOCABULARY, TOP_K, "float32", skipped=("long",))


def answer(name: str) -> list[int]:
    return [ord(name) % VOCABULARY] * (1 + ord(name) % 3)


def logits_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randn(len(answer(name)) + 1, VOCABULARY, generator=generator)


def top_k(ids) -> list[TeacherTargets]:
    return [TeacherTargets.from_logits(answer(name), logits_of(name), TOP_K) for name in ids]


def hidden(ids) -> list[TeacherTargets]:
    return [TeacherTargets.from_hidden(answer(name), logits_of(name)[:, :HIDDEN].bfloat16()) for name in ids]


def build(directory: Path, compute=top_k, facts: CacheFacts = FACTS, head: OutputHead | None = None) -> Path:
    shards = compute_shards(directory / "work", PLAN, compute)
    with RunRecord("stillhouse.models.target_cache", StrictModel(), {}) as record:
        publish_cache(directory / "cache", shards, facts, head, record)
    return directory / "cache"


def test_top_k_targets_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    cache = TargetCache(build(tmp_path))
    names = ["d", "a", "c", "d"]
    targets = cache.targets(names)
    assert targets.answers == tuple(tuple(answer(name)) for name in names)
    logits = torch.cat([logits_of(name) for name in names])
    assert torch.equal(targets.top_logits, logits.sort(descending=True).values[:, :TOP_K])
    assert torch.equal(logits.gather(1, targets.top_ids.long()), targets.top_logits)
    torch.testing.assert_close(targets.log_partition, logits.logsumexp(-1))
    gold = torch.cat([logits_of(n)[:-1].gather(1, torch.tensor(answer(n))[:, None])[:, 0] for n in names])
    assert torch.equal(targets.gold_logit[~targets.gold_logit.isnan()], gold)
    assert targets.gold_logit.isnan().sum() == len(names)
    assert cache.example_ids == set("abcde") and cache.facts == FACTS and cache.head is None


def test_hidden_states_keep_their_type_and_the_head_comes_along(tmp_path: Path) -> None:
    head = OutputHead(torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY))
    cache = TargetCache(build(tmp_path, hidden, CacheFacts("hidden", VOCABULARY, 0, "bfloat16"), head))
    expected = torch.cat([part.hidden for part in hidden("ca")])
    assert torch.equal(cache.targets("ca").hidden, expected) and expected.dtype == torch.bfloat16
    assert cache.head is not None and cache.head.equals(head)


def test_the_record_holds_the_teacher_s_own_nll(tmp_path: Path) -> None:
    record = json.loads((build(tmp_path) / "run.json").read_text())
    names = "abcde"
    losses = [
        torch.nn.functional.cross_entropy(logits_of(n)[:-1], torch.tensor(answer(n)), reduction="sum") for n in names
    ]
    tokens = sum(len(answer(name)) for name in names)
    assert record["answer_tokens"] == tokens and record["examples"] == 5 and record["skipped"] == 1
    assert record["teacher_gold_nll_per_token"] == pytest.approx(sum(losses).item() / tokens, rel=1e-5)


@pytest.mark.fault(
    "kill -9 of a teacher cache between shards",
    "finished shards kept; the cache equals an undisturbed one bit for bit",
)
def test_a_build_killed_between_shards_goes_on_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.touch()

    def counted(ids):
        with calls.open("a") as log:
            log.write(f"{''.join(ids)}\n")
        return top_k(ids)

    def killed_at_the_second(ids):
        if ids == PLAN[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted(ids)

    child = os.fork()
    if child == 0:
        try:
            build(tmp_path / "killed", killed_at_the_second)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "cache").exists()
    resumed, undisturbed = build(tmp_path / "killed", counted), build(tmp_path / "undisturbed")
    assert calls.read_text().split() == ["ab", "c", "de"]
    for path in undisturbed.iterdir():
        if path.name != "run.json":
            assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


@pytest.mark.fault("truncated or bit-flipped shard of an earlier attempt", "computed again, the others kept")
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_a_damaged_shard_of_an_earlier_attempt_is_computed_again(tmp_path: Path, damage) -> None:
    shards = compute_shards(tmp_path / "work", PLAN, top_k)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(damage(whole))
    compute_shards(tmp_path / "work", PLAN, top_k)
    assert shards[1].read_bytes() == whole


@pytest.mark.fault(
    "bit flip or cut in a finished teacher cache",
    "refused; the line names the file and what to delete",
)
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.json"])
def test_a_corrupt_file_is_named(tmp_path: Path, name: str) -> None:
    cache = build(tmp_path)
    data = bytearray((cache / name).read_bytes())
    data[-3] ^= 1
    (cache / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: is corrupt"):
        TargetCache(cache)
    shutil.rmtree(cache)
    assert torch.equal(TargetCache(build(tmp_path)).targets("c").top_logits, top_k("c")[0].top_logits)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    cache = build(tmp_path)
    (cache / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002.safetensors: is missing"):
        TargetCache(cache)


@pytest.mark.fault("shard that breaks while it is read", "refused; the line names the file and what to delete")
def test_a_shard_that_breaks_while_it_is_used_is_named(tmp_path: Path) -> None:
    cache = TargetCache(build(tmp_path))
    (tmp_path / "cache" / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors: cannot be read"):
        cache.targets("c")


def test_an_example_that_the_cache_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no targets for example z: it was built from other data"):
        TargetCache(build(tmp_path)).targets("z")
