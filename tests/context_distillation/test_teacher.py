"""The teacher step refuses what would teach nonsense, resumes, and its shared prefixes change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from context_distillation.conftest import CONTEXTS, cache_settings
from support.tiny_models import make_tiny_llama, tiny_llama_config
from transformers import Gemma2Config, Gemma2ForCausalLM

from stillhouse.config.training import LoraSettings
from stillhouse.models.loading import load_model
from stillhouse.models.lora import add_lora
from stillhouse.models.output_head import require_plain_head
from stillhouse.models.target_cache import TargetCache
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.context_distillation import teacher as program
from stillhouse.studies.context_distillation.data import student_data, teacher_examples
from stillhouse.studies.context_distillation.run_settings import ContextSettings
from stillhouse.studies.context_distillation.teacher import CachedTeacher, OnlineTeacher, TeacherForward, TeacherStep


def step(tiny_model: Path, task_data: Path, directory: Path, **changes) -> TeacherStep:
    values = {
        "data": task_data,
        "student": tiny_model,
        "teacher": tiny_model,
        "output": directory / "out",
        "work": directory / "work",
        "cache": cache_settings("top_k", CONTEXTS["grouped"]),
    }
    return TeacherStep.model_validate(values | changes)


def run(*arguments, **changes) -> Path:
    settings = step(*arguments, **changes)
    program.main(settings)
    return settings.output


@pytest.mark.parametrize("sampling", ["grouped", "fixed"])
@pytest.mark.parametrize("mode", ["top_k", "hidden"])
def test_a_shared_prefix_gives_what_whole_sequences_give(sampling, mode, tiny_model, problems, renderer) -> None:
    model = load_model(tiny_model, "fp32")
    examples = teacher_examples(problems, renderer, CONTEXTS[sampling], 2048)
    forward = TeacherForward(model, examples, mode, 16, batch_tokens=300)
    shared = [prefix for group, prefix in forward._prefixes.items() if group is not None]
    assert shared and min(map(len, shared)) > 60
    ids = [sequence.example_id for sequence in examples.sequences]
    for sequence, targets in zip(examples.sequences, forward(ids), strict=True):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([sequence.input_ids]), output_hidden_states=True)
        rows = list(sequence.logit_positions("with_last"))
        found = targets.top_logits if mode == "top_k" else targets.hidden
        whole = output.logits[0, rows].topk(16).values if mode == "top_k" else output.hidden_states[-1][0, rows]
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_the_step_leaves_a_record_and_names_what_was_reserved(tiny_model, task_data, tmp_path) -> None:
    output = run(tiny_model, task_data, tmp_path, cache=cache_settings("top_k", CONTEXTS["fixed"]))
    facts = TargetCache(output).facts
    assert len(facts.reserved) == 2 and facts.dtype == "float32" and facts.vocab_size == 384
    record = json.loads((output / "run.json").read_text())
    assert record["examples"] == 8 and record["settings"]["cache"]["context"]["sampling"] == "fixed"


@pytest.mark.parametrize(("sampling", "prefixes"), [("fixed", 1), ("grouped", 3), ("per_example", 0)])
def test_shared_shots_are_read_once_a_group(sampling, prefixes, tiny_model, task_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(program, "EXAMPLES_PER_SHARD", 3)
    read, encode = [], program.encode_prefix
    monkeypatch.setattr(program, "encode_prefix", lambda model, ids: read.append(tuple(ids)) or encode(model, ids))
    run(tiny_model, task_data, tmp_path, cache=cache_settings("top_k", CONTEXTS[sampling]))
    shared = [ids for ids in read if ids]
    assert len(shared) == len(set(shared)) == prefixes


def test_a_stopped_build_resumes_bit_equal(tiny_model, task_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(program, "EXAMPLES_PER_SHARD", 3)
    undisturbed = run(tiny_model, task_data, tmp_path / "undisturbed")
    compute = TeacherForward.__call__
    calls = []

    def stopped(self, ids):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, ids)

    monkeypatch.setattr(TeacherForward, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, task_data, tmp_path / "stopped")
    resumed = run(tiny_model, task_data, tmp_path / "stopped")
    assert len(calls) == 5  # two shards, the stop, and the two that were missing
    names = sorted(path.name for path in undisturbed.iterdir() if path.name != "run.json")
    assert len(names) == 6
    for name in names:
        assert (undisturbed / name).read_bytes() == (resumed / name).read_bytes(), name


def test_another_vocabulary_is_refused_with_both_sizes(tiny_model, task_data, tmp_path) -> None:
    other = make_tiny_llama(tmp_path / "other", vocab_size=400)
    with pytest.raises(UserError, match="student's vocabulary has 384 entries, the teacher's 400"):
        run(tiny_model, task_data, tmp_path, teacher=other)


def test_another_tokenizer_of_the_same_size_is_refused(tiny_model, task_data, tmp_path) -> None:
    other = make_tiny_llama(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|in_start|>"))
    write_manifest(other)
    with pytest.raises(UserError, match=r"tokenizer differs from .* in 2 tokens"):
        run(tiny_model, task_data, tmp_path, teacher=other)


def test_a_larger_model_of_the_same_vocabulary_teaches(tiny_model, task_data, tmp_path, problems, renderer, student):
    from transformers import LlamaForCausalLM

    config = tiny_llama_config()
    config.hidden_size, config.intermediate_size = 48, 80
    config.head_dim = 12
    other = make_tiny_llama(tmp_path / "other")
    LlamaForCausalLM(config).save_pretrained(other)
    write_manifest(other)
    output = run(tiny_model, task_data, tmp_path, teacher=other, cache=cache_settings("hidden", CONTEXTS["fixed"]))
    source = CachedTeacher(output, student, "hidden", 0)
    identity = teacher_examples(problems, renderer, CONTEXTS["fixed"], 2048).sequences[0].example_id
    logits = source.head.logits(source.targets([identity]).hidden)
    assert logits.shape[1] == 384 and source.head.weight.shape == (384, 48)


def test_a_task_lora_teaches(tiny_model, task_data, tmp_path, build_cache) -> None:
    model = add_lora(load_model(tiny_model, "fp32"), LoraSettings(rank=2, target_modules=("q_proj",)), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    for number in (2, 10):
        model.save_pretrained(tmp_path / "task_teacher" / f"checkpoint-{number}")
    write_manifest(tmp_path / "task_teacher")
    assert program.adapter_directory(tmp_path / "task_teacher").name == "checkpoint-10"
    settings = cache_settings("top_k", CONTEXTS["fixed"], adapter=True)
    output = run(tiny_model, task_data, tmp_path, adapter=tmp_path / "task_teacher", cache=settings)
    taught, base = TargetCache(output), TargetCache(build_cache("top_k", CONTEXTS["fixed"]))
    identity = next(iter(base.example_ids))
    assert not torch.equal(taught.targets([identity]).top_logits, base.targets([identity]).top_logits)


def test_fewer_examples_than_shots_is_refused(tiny_model, task_data, tmp_path) -> None:
    cache = cache_settings("top_k", ContextSettings(shots=8), train_examples=6)
    with pytest.raises(UserError, match=r"context\.shots is 8 but only 5 of 6 training examples"):
        run(tiny_model, task_data, tmp_path, cache=cache)


def test_chat_without_a_template_is_refused(task_data, tmp_path) -> None:
    model = make_tiny_llama(tmp_path / "plain", chat_template=False)
    cache = cache_settings("top_k", CONTEXTS["fixed"], prompt_format="chat")
    with pytest.raises(UserError, match="no chat template"):
        run(model, task_data, tmp_path, cache=cache)


def test_a_teacher_sequence_over_the_limit_is_refused_or_a_counted_skip(
    tiny_model, task_data, tmp_path, problems, renderer
) -> None:
    examples = teacher_examples(problems, renderer, CONTEXTS["per_example"], 2048)
    limit = max(map(len, examples.sequences)) - 1
    over = [sequence.example_id for sequence in examples.sequences if len(sequence) > limit]
    cache = cache_settings("top_k", CONTEXTS["per_example"], max_length=limit)
    with pytest.raises(
        UserError, match=f"{over[0]}: the sequence has {limit + 1} tokens but teacher.max_length is {limit}"
    ):
        run(tiny_model, task_data, tmp_path, cache=cache)
    cache = cache_settings("top_k", CONTEXTS["per_example"], max_length=limit, overlong="skip")
    facts = TargetCache(run(tiny_model, task_data, tmp_path, cache=cache)).facts
    assert facts.skipped == tuple(over)
    data = student_data(problems, renderer, CONTEXTS["per_example"], 512, untaught=facts.skipped)
    assert len(data) == len(problems) - len(over)


def test_k_above_the_vocabulary_is_refused(tiny_model, task_data, tmp_path) -> None:
    cache = cache_settings("top_k", CONTEXTS["fixed"], top_k=500)
    with pytest.raises(UserError, match=r"cache_top_k \(500\) is above the model's vocabulary \(384\)"):
        run(tiny_model, task_data, tmp_path, cache=cache)


def test_a_cache_of_another_mode_is_refused(student, build_cache) -> None:
    with pytest.raises(UserError, match=r"holds mode top_k .* but the loss needs hidden"):
        CachedTeacher(build_cache("top_k", CONTEXTS["fixed"]), student, "hidden", 0)
    with pytest.raises(UserError, match=r"K_max 16\), but the loss needs top_k with K 17"):
        CachedTeacher(build_cache("top_k", CONTEXTS["fixed"]), student, "top_k", 17)


def test_an_online_teacher_needs_an_adapter(tiny_model, problems, renderer) -> None:
    examples = teacher_examples(problems, renderer, CONTEXTS["fixed"], 2048)
    with pytest.raises(UserError, match="online but the student is fully fine-tuned"):
        OnlineTeacher(load_model(tiny_model, "fp32"), examples, "top_k", 16, 512)


def test_an_online_teacher_leaves_the_student_s_modes_and_adapter_as_they_were(student, problems, renderer) -> None:
    examples = teacher_examples(problems, renderer, CONTEXTS["fixed"], 2048)
    ids = torch.tensor([examples.sequences[0].input_ids[:20]])
    before = student(input_ids=ids).logits
    OnlineTeacher(student, examples, "hidden", 0, 512).targets([examples.sequences[0].example_id])
    assert all(module.training for module in student.modules())
    assert torch.equal(student(input_ids=ids).logits, before)


def test_capped_logits_are_refused_where_hidden_states_stand_for_them() -> None:
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(UserError, match=r"caps its logits \(final_logit_softcapping 0.5\).*use distillation.loss mse"):
        require_plain_head(model)
    config.final_logit_softcapping = None
    require_plain_head(Gemma2ForCausalLM(config).eval())


def test_question_only_and_zero_shot_teachers_are_rendered_by_their_context(problems, renderer) -> None:
    zero = teacher_examples(problems, renderer, ContextSettings(shots=0), 2048)
    assert [s.input_ids for s in zero.sequences] == [
        s.input_ids for s in student_data(problems, renderer, ContextSettings(shots=0), 2048).sequences
    ]
    questions = teacher_examples(problems, renderer, ContextSettings(shots=2, exemplars="question_only"), 2048)
    worked = teacher_examples(problems, renderer, ContextSettings(shots=2), 2048)
    for one, two in zip(questions.sequences, worked.sequences, strict=True):
        assert len(one) < len(two) and one.answer_ids == two.answer_ids
