"""The transformers engine, the choice of an engine, and what is refused before anything is generated."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines import open_engine
from stillhouse.evaluation.engines import vllm_engine as vllm_module
from stillhouse.evaluation.engines.base import choose_engine
from stillhouse.evaluation.engines.checks import cut_at_stop, stop_token_ids
from stillhouse.evaluation.engines.transformers_engine import TransformersEngine
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_manifest
from tests.evaluation.adapters import make_adapter
from tests.support.tiny_models import make_tiny_llama

TRANSFORMERS = EngineSettings(kind="transformers", precision="fp32", batch_size=4, max_model_length=128)
GREEDY = GenerationSettings(max_new_tokens=12)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 30, 31, 32], [40], [50, 51, 52, 53, 54], [60, 61]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(tiny: Path) -> list[Path]:
    return [make_adapter(tiny, tiny.parent / f"adapter-{seed}", rank=4 * seed, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(tiny: Path, adapters: list[Path]) -> TransformersEngine:
    opened = open_engine(tiny, TRANSFORMERS, adapters)
    assert isinstance(opened, TransformersEngine)
    return opened


def naive_greedy(model: torch.nn.Module, prompt: list[int], stop_ids: tuple[int, ...], limit: int) -> list[int]:
    """Argmax over whole forward passes, one token at a time, without batch, cache or `generate`."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_the_plain_argmax(engine: TransformersEngine, tiny: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        expected = naive_greedy(model, prompt, stop_token_ids(tiny, tokenizer), GREEDY.max_new_tokens)
        assert list(answer.token_ids) == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.finished == (len(expected) < GREEDY.max_new_tokens)


def test_padding_and_batch_order_do_not_change_an_answer(engine: TransformersEngine) -> None:
    alone = [engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert engine.generate(PROMPTS, GREEDY) == alone
    assert engine.generate(PROMPTS[::-1], GREEDY) == alone[::-1]


def test_each_adapter_answers_as_if_loaded_alone_and_the_base_stays_itself(
    engine: TransformersEngine, tiny: Path, adapters: list[Path]
) -> None:
    base = engine.generate(PROMPTS, GREEDY)
    together = [engine.generate(PROMPTS, GREEDY, adapter) for adapter in adapters]
    for adapter, answers in zip(adapters, together, strict=True):
        with closing(open_engine(tiny, TRANSFORMERS, [adapter])) as single:
            assert single.generate(PROMPTS, GREEDY, adapter) == answers
    assert engine.generate(PROMPTS, GREEDY) == base
    assert base != together[0] != together[1] != base


def test_sampling_depends_on_its_seed_alone(engine: TransformersEngine) -> None:
    settings = GenerationSettings(max_new_tokens=8, temperature=1.0, seed=1)
    first = engine.generate(PROMPTS, settings)
    torch.rand(3)
    assert engine.generate(PROMPTS, settings) == first
    assert engine.generate(PROMPTS, settings.model_copy(update={"seed": 2})) != first


def test_an_answer_ends_before_any_stop_token_that_the_model_lists(tiny: Path, engine: TransformersEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert stop_token_ids(tiny, tokenizer) == (2,)
    third = engine.generate(PROMPTS[:1], GREEDY)[0].token_ids[2]
    directory = make_tiny_llama(tiny.parent / "two-stops")
    generation = {"eos_token_id": [2, third], "temperature": 0.3, "do_sample": True, "repetition_penalty": 9.0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    with closing(open_engine(directory, TRANSFORMERS)) as stopping:
        (answer,) = stopping.generate(PROMPTS[:1], GREEDY)
    expected, finished = cut_at_stop(engine.generate(PROMPTS[:1], GREEDY)[0].token_ids, [2, third])
    assert (answer.token_ids, answer.finished) == (expected, finished) and finished


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_generated(engine: TransformersEngine) -> None:
    with pytest.raises(UserError, match=r"8-shot test: prompt 1 has 120 tokens.*over the limit of 128"):
        engine.generate([[5], [5] * 120], GREEDY, description="8-shot test")
    with pytest.raises(UserError, match="prompt 0 is empty"):
        engine.generate([[]], GREEDY)


def test_no_prompts_give_no_answers(engine: TransformersEngine) -> None:
    assert engine.generate([], GREEDY) == []


def test_an_adapter_the_engine_was_not_opened_with_is_an_error(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match="not opened with adapter"):
        engine.generate(PROMPTS, GREEDY, Path("elsewhere"))


def break_weights(directory: Path) -> str:
    (directory / "adapter_model.safetensors").write_bytes(b"half a file")
    return r"adapter_model\.safetensors: is corrupt"


def remove_weights(directory: Path) -> str:
    (directory / "adapter_model.safetensors").unlink()
    return r"adapter_model\.safetensors: does not exist"


def remove_config(directory: Path) -> str:
    (directory / "adapter_config.json").unlink()
    return r"adapter_config\.json: does not exist"


def flip_a_byte(directory: Path) -> str:
    write_manifest(directory)
    weights = bytearray((directory / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return r"adapter_model\.safetensors: is corrupt"


@pytest.mark.parametrize("damage", [break_weights, remove_weights, remove_config, flip_a_byte])
def test_a_damaged_adapter_is_named_before_the_engine_starts(tiny: Path, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    message = damage(adapter := make_adapter(tiny, tmp_path / "adapter", rank=2, seed=0))
    with pytest.raises(UserError, match=message):
        open_engine(tiny, EngineSettings(kind="auto"), [adapter])


def test_a_missing_model_or_adapter_directory_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        open_engine(tmp_path / "absent", TRANSFORMERS)
    with pytest.raises(UserError, match="absent: no such adapter directory"):
        open_engine(tiny, TRANSFORMERS, [tmp_path / "absent"])


def test_an_adapter_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", rank=2, seed=0)
    other = make_tiny_llama(tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(UserError, match="does not fit this model"):
        open_engine(other, TRANSFORMERS, [adapter])


def test_auto_takes_vllm_only_where_nothing_speaks_against_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = EngineSettings(kind="auto")
    monkeypatch.setattr(vllm_module, "objection", lambda model, adapters: None)
    assert choose_engine(tiny, auto, [], servable_by_vllm=True)[0] == "vllm"
    assert choose_engine(tiny, auto, [], servable_by_vllm=False) == (
        "transformers",
        "the catalogue says that vLLM does not serve this model",
    )
    assert choose_engine(tiny, TRANSFORMERS, [], servable_by_vllm=True) == ("transformers", "configured")
    monkeypatch.setattr(vllm_module, "objection", lambda model, adapters: "vLLM is not installed")
    assert choose_engine(tiny, auto, [], servable_by_vllm=True) == ("transformers", "vLLM is not installed")
    with pytest.raises(UserError, match=r"engine\.kind is vllm, but vLLM is not installed: set engine\.kind"):
        choose_engine(tiny, EngineSettings(kind="vllm"), [], servable_by_vllm=True)


def test_without_vllm_the_reason_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert vllm_module.objection(tiny, []) == "vLLM is not installed"


def test_an_engine_that_got_fewer_gpus_than_it_spreads_over_refuses(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.evaluation.engines.vllm_engine import _device_options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device_options(EngineSettings(tensor_parallel=2), tiny)["tensor_parallel_size"] == 2
    with pytest.raises(UserError, match="tensor_parallel is 4, but the job has 2 GPUs: raise --resources gpu"):
        _device_options(EngineSettings(tensor_parallel=4), tiny)


def test_an_engine_refuses_gpus_among_which_it_cannot_divide_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.evaluation.engines.vllm_engine import _device_options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    model = tmp_path / "smollm2_135m"
    model.mkdir()
    (model / "config.json").write_text('{"num_attention_heads": 9, "num_key_value_heads": 3}')
    assert _device_options(EngineSettings(tensor_parallel=3), model)["tensor_parallel_size"] == 3
    with pytest.raises(UserError, match=r"tensor_parallel is 4, .* 9 attention heads .* 'smollm2_135m' .*gpus to 3$"):
        _device_options(EngineSettings(tensor_parallel=4), model)
