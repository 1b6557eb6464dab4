"""ms-swift beside our training loop: its loss, the process that it runs in, and what is said where it is missing.

That both compute the same is a test of `test_benchmarks.py`, which runs where ms-swift's environment is.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import ms_swift
from benchmarks.context_distillation import LONGEST, all_logits, problems
from benchmarks.harness import difference
from benchmarks.ms_swift import MS_SWIFT, TopKDivergence, Worker, cached_runs, dataset, packages
from benchmarks.scale import TINY, model_directory, student
from stillhouse.models.loading import load_tokenizer
from stillhouse.models.lora import adapter_disabled
from stillhouse.runtime.errors import UserError
from stillhouse.studies.context_distillation.teacher import OnlineTeacher

# Speaks as the worker does, and trains nothing.
STAND_IN = """
import json, sys, torch
from safetensors.torch import save_file
loss = torch.tensor(json.load(open(sys.argv[1]))["losses"])
print(json.dumps({"ready": True}), flush=True)
for round, line in enumerate(sys.stdin):
    path = json.loads(line)["outcome"]
    save_file({"loss": loss + round}, path)
    print(json.dumps({"done": path}), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ms_swift")


def test_its_loss_is_the_divergence_of_the_renormalised_top_k_and_a_share_of_the_cross_entropy(folder: Path) -> None:
    scale = MS_SWIFT.change(TINY)
    model = student(model_directory(folder, scale), scale)
    data, examples = problems(folder, scale)
    [batch] = data.micro_batches(range(len(data)), LONGEST)
    teacher = OnlineTeacher(model, examples, "top_k", scale.top_k, 8192)
    terms = TopKDivergence(teacher, alpha=3.0)(model, batch, 1)

    learnt, labels = all_logits(model, list(data.sequences))
    with torch.no_grad(), adapter_disabled(model):
        top = all_logits(model, list(examples.sequences))[0].topk(scale.top_k)
    taught, own = top.values.softmax(-1), learnt.gather(1, top.indices).softmax(-1)
    expected = (taught * (taught / own).log()).sum() + 3.0 * functional.cross_entropy(learnt, labels, reduction="sum")
    assert terms.count == len(labels)
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-5)


def test_the_comparison_notices_another_k(folder: Path) -> None:
    scale = MS_SWIFT.checked(MS_SWIFT.change(TINY))
    runs, others = (cached_runs(folder, each)() for each in (scale, replace(scale, top_k=scale.top_k // 2)))
    assert difference(MS_SWIFT, "the same", cached_runs(folder, scale)(), "ours", runs) < MS_SWIFT.tolerance
    with pytest.raises(UserError, match=r"above the tolerance 1e-04: nothing was timed"):
        difference(MS_SWIFT, "half of K", others, "ours", runs)


def test_it_reads_the_prompts_of_student_and_teacher_and_the_same_answers(folder: Path) -> None:
    scale = MS_SWIFT.change(TINY)
    tokenizer = load_tokenizer(model_directory(folder, scale))
    data, examples = problems(folder, scale)
    for row, ours, theirs in zip(dataset(folder, scale), data.sequences, examples.sequences, strict=True):
        asked, answered = (message["content"] for message in row["messages"])
        for text, ids in ((asked, ours.prompt_ids), (row["teacher_prompt"], theirs.prompt_ids)):
            assert tokenizer(text, add_special_tokens=False).input_ids == ids
        answer = tokenizer(answered, add_special_tokens=False).input_ids
        assert [*answer, tokenizer.eos_token_id] == ours.answer_ids == theirs.answer_ids


def test_a_worker_answers_each_time_that_it_is_asked_and_ends_with_its_object(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {"losses": [1.0, 2.0]}, (sys.executable, "-c", STAND_IN), tmp_path)
    assert worker.outcome()["loss"].tolist() == [1.0, 2.0]
    assert worker.outcome()["loss"].tolist() == [2.0, 3.0]
    process = worker.process
    del worker
    gc.collect()
    assert process.poll() == 0


def test_a_worker_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the worker of ms-swift ended with 1, and said: KeyError: 'losses'"):
        Worker(tmp_path, {}, (sys.executable, "-c", STAND_IN), tmp_path)


def test_a_missing_environment_is_one_line_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ms_swift, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"is missing, .* python -m stillhouse\.assets\.environment requirements=envs/"):
        packages()
