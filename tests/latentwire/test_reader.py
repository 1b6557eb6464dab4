"""Readers: one path for prefixes and texts, so that training, generation and replay see the same thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latentwire.tiny_readers import ANSWERS, FAMILIES, TEXTS, answers_of, make_families, tiny_reader
from support.packaged_tokenizers import PACKAGED, save_packaged_tokenizer
from support.tiny_models import tiny_llama_config
from torch.nn import functional
from transformers import LlamaForCausalLM

from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.decoding import first_tokens
from stillhouse.studies.latentwire.prompt import Prefix
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import ReaderSettings

MATERIALISED = Path(__file__).parents[2] / "resources" / "models"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def naive_answer_logits(reader: Reader, prompt: list[int], answer: str) -> torch.Tensor:
    """The plain way: one sequence of token ids without padding, cache or embeddings."""
    ids = [*prompt, *reader.answer_ids(answer)]
    logits = reader.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(ids) - 1]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_of_texts_gives_the_logits_of_each_text_alone(paths, family, padding):
    reader = tiny_reader(paths, family, padding=padding)
    prompts = [reader.text_prompt(text) for text in TEXTS]
    assert len(prompts[0]) != len(prompts[1])
    rows = reader.answer_rows(reader.text_embeddings(prompts), answers_of(reader))
    expected = torch.cat([naive_answer_logits(reader, *pair) for pair in zip(prompts, ANSWERS, strict=True)])
    assert torch.allclose(rows.logits, expected, atol=1e-4)
    lengths = [len(reader.answer_ids(answer)) for answer in ANSWERS]
    assert rows.example.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert rows.position.tolist() == [place for length in lengths for place in range(length)]
    assert rows.labels.tolist() == [token for answer in ANSWERS for token in reader.answer_ids(answer)]
    assert torch.allclose(reader.model.get_output_embeddings()(rows.hidden), rows.logits, atol=1e-5)


def test_padding_of_answers_is_no_label_and_changes_nothing(paths, family):
    reader = tiny_reader(paths, family)
    short, long = answers_of(reader, ("3",)), answers_of(reader, ("3", "a much longer answer than that"))
    padding = long.attention_mask[0] == 0
    assert padding.any() and (long.labels[0][padding] == -100).all()
    one = reader.answer_logits(reader.text_embeddings([reader.text_prompt(TEXTS[0])]), short)
    both = reader.answer_rows(reader.text_embeddings([reader.text_prompt(text) for text in TEXTS]), long)
    assert torch.allclose(one, both.logits[both.example == 0], atol=1e-4)


def assert_replay_equals_text(reader: Reader) -> None:
    """The same prompt, logits and answer, bit for bit, where a text's embeddings stand in the place of latents."""
    answers = answers_of(reader, ANSWERS[:1])
    text = reader.text_embeddings([reader.text_prompt(TEXTS[0])])
    replayed = reader.prompt_embeddings(reader.embed(reader.text_ids(TEXTS[0]))[None])
    assert torch.equal(text.inputs_embeds, replayed.inputs_embeds)
    assert torch.equal(reader.answer_logits(text, answers), reader.answer_logits(replayed, answers))
    settings = AnswerGenerationSettings(max_new_tokens=6)
    assert reader.generate(text, settings) == reader.generate(replayed, settings)


def test_replaying_a_texts_own_embeddings_equals_the_text_arm(paths, family):
    assert_replay_equals_text(tiny_reader(paths, family, text_prompt="content_only"))


def test_generation_writes_what_the_library_generates(paths, family):
    reader = tiny_reader(paths, family)
    prompts = [reader.text_prompt(text) for text in TEXTS]
    answers = reader.generate(reader.text_embeddings(prompts), AnswerGenerationSettings(max_new_tokens=8))
    for prompt, answer in zip(prompts, answers, strict=True):
        output = reader.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=list(reader.stop_ids),
        )[0, len(prompt) :]
        text = reader.tokenizer.decode(output, skip_special_tokens=True)
        assert answer == text.strip().partition("\n")[0].strip()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layers", [False, True])
def test_training_and_generation_agree_on_the_first_token(paths, family, padding, layers):
    reader = tiny_reader(paths, family, padding=padding, prefix_tuning=2 if layers else 0)
    numbers = reader.layer_shape.numbers
    torch.manual_seed(0)
    deep = reader.layer_shape.split(torch.randn(2, 3, numbers)) if layers else ()
    vectors = torch.randn(2, 3, reader.hidden_size)
    prompts = [reader.prompt_embeddings(Prefix(vectors, layers=deep))]
    if not layers:
        texts = [reader.text_ids(text) for text in TEXTS]
        prompts.append(reader.prompt_embeddings(Prefix(vectors, torch.tensor([[1, 0, 1], [1, 1, 1]])), texts))
    for prompt in prompts:
        reader.check_first_step(prompt, answers_of(reader))


def test_the_check_at_t_0_refuses_a_reader_whose_training_path_is_shifted(paths, monkeypatch):
    reader = tiny_reader(paths, "llama")
    torch.manual_seed(0)
    prompt = reader.prompt_embeddings(torch.randn(2, 3, reader.hidden_size))
    right = reader.first_logits

    def one_early(prompt):
        return right(type(prompt)(prompt.inputs_embeds[:, :-1], prompt.attention_mask[:, :-1]))

    monkeypatch.setattr(reader, "first_logits", one_early)
    with pytest.raises(UserError, match="t = 0"):
        reader.check_first_step(prompt, answers_of(reader))


def test_keys_and_values_before_the_prompt_act_as_a_text_that_was_read_before(paths):
    reader = tiny_reader(paths, "llama", text_prompt="content_only")
    text = reader.text_ids("Question: ")
    cache = reader.model(input_ids=torch.tensor([text]), use_cache=True).past_key_values
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    prefix = reader.embed(reader.text_ids(TEXTS[0]))[None]
    answers = answers_of(reader, ANSWERS[:1])
    deep = reader.answer_logits(reader.prompt_embeddings(Prefix(prefix, layers=layers)), answers)
    prompt = [*text, *reader.text_prompt(TEXTS[0])]
    assert torch.allclose(deep, naive_answer_logits(reader, prompt, ANSWERS[0]), atol=1e-4)


def test_a_prompt_that_ends_above_the_models_context_is_refused(paths, family):
    reader = tiny_reader(paths, family)
    prompts, answers = [reader.text_prompt(text) for text in TEXTS], ("a much longer answer than that", "17")
    lengths = [len(prompt) + len(reader.answer_ids(one)) for prompt, one in zip(prompts, answers, strict=True)]
    batch, needed = reader.text_embeddings(prompts), max(lengths)
    reader.model.config.max_position_embeddings = needed
    reader.answer_rows(batch, answers_of(reader, answers))  # padding makes it wider than any of its rows
    reader.model.config.max_position_embeddings = needed - 1
    with pytest.raises(UserError, match=f"{family}: .* has {needed} tokens, the model takes {needed - 1}: nothing is"):
        reader.answer_rows(batch, answers_of(reader, answers))
    reader.model.config.max_position_embeddings = len(prompts[1]) - 1
    with pytest.raises(UserError, match=r"task\.max_text_bytes"):
        reader.generate(batch, AnswerGenerationSettings())


def test_a_dropped_vector_is_not_seen(paths, family):
    reader = tiny_reader(paths, family)
    torch.manual_seed(0)
    vectors = torch.randn(1, 3, reader.hidden_size)
    answers = answers_of(reader, ANSWERS[:1])
    masked = reader.prompt_embeddings(Prefix(vectors, torch.tensor([[1, 0, 1]])))
    absent = reader.prompt_embeddings(vectors[:, [0, 2]])
    assert torch.allclose(reader.answer_logits(masked, answers), reader.answer_logits(absent, answers), atol=1e-4)


@pytest.mark.parametrize("prefix_tuning", [0, 2])
def test_the_keys_and_values_of_a_dropped_vector_are_not_seen(paths, family, prefix_tuning):
    reader = tiny_reader(paths, family, prefix_tuning=prefix_tuning)
    torch.manual_seed(0)
    vectors, deep = torch.randn(2, 12, reader.hidden_size), torch.randn(2, 12, reader.layer_shape.numbers)
    # Far apart: were the dropped ones left between them, Gemma's 16 sliding positions would not reach the first.
    kept, mask = ([0, 11], [4, 5]), torch.zeros(2, 12, dtype=torch.long)
    for row, places in enumerate(kept):
        mask[row, places] = 1
    masked = reader.prompt_embeddings(Prefix(vectors, mask, reader.layer_shape.split(deep)))
    rows = reader.answer_rows(masked, answers_of(reader))
    for row, places in enumerate(kept):
        layers = reader.layer_shape.split(deep[row : row + 1, places])
        absent = reader.prompt_embeddings(Prefix(vectors[row : row + 1, places], layers=layers))
        expected = reader.answer_logits(absent, answers_of(reader, ANSWERS[row : row + 1]))
        assert torch.allclose(rows.logits[rows.example == row], expected, atol=1e-4)


def test_a_reader_begins_with_bos_as_its_tokenizer_does_unless_told_otherwise(paths):
    automatic = {family: tiny_reader(paths, family) for family in FAMILIES}
    assert automatic["llama"].bos_ids == [] and automatic["gemma"].bos_ids == [0]
    assert tiny_reader(paths, "llama", bos="always").bos_ids == [0]
    never = tiny_reader(paths, "gemma", bos="never")
    assert never.bos_ids == [] and never.text_prompt(TEXTS[0])[0] != 0
    for reader in automatic.values():
        content_only = reader.text_prompt(TEXTS[0], "content_only")
        assert content_only == [*reader.bos_ids, *reader.text_ids(TEXTS[0]), *reader.anchor_ids]
        prompt = reader.prompt_embeddings(torch.zeros(1, 4, reader.hidden_size))
        assert prompt.inputs_embeds.shape[1] == len(reader.bos_ids) + 4 + len(reader.anchor_ids)


def test_chat_full_needs_a_template(paths):
    assert "<|im_start|>assistant" in tiny_reader(paths, "llama").tokenizer.decode(
        tiny_reader(paths, "llama").text_prompt(TEXTS[0], "chat_full")
    )
    with pytest.raises(UserError, match=r"gemma: chat_full, but its tokenizer has no chat template"):
        tiny_reader(paths, "gemma").text_prompt(TEXTS[0], "chat_full")


def assert_anchor_and_answer_meet(reader: Reader) -> None:
    """At t = 0 the label is the token that a tokenizer puts after the anchor when it sees both at once."""
    for answer in ("Paris", "1066", "the Treaty of Versailles", "élan vital", "$5.2 million", "東京"):
        joint = reader.text_ids(f"{reader.settings.anchor}{answer}")
        anchor, ids = reader.anchor_ids, reader.answer_ids(answer)
        assert [*anchor, *ids[:-1]] == joint
        assert ids[-1] in reader.stop_ids
        assert reader.tokenizer.decode(ids[:-1]).strip() == answer


def test_the_answers_first_token_follows_the_anchor(paths, family):
    assert_anchor_and_answer_meet(tiny_reader(paths, family))


@pytest.fixture(scope="session", params=PACKAGED)
def packaged_reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A packaged tokenizer; a tiny model with as many embeddings stands in for the weights."""
    tokenizer = load_tokenizer(save_packaged_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer")))
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(len(tokenizer))).eval()
    return Reader(request.param, model, tokenizer, ReaderSettings(precision="fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
def test_anchor_bos_padding_and_the_first_step_hold_for_packaged_tokenizers(packaged_reader, padding):
    reader = packaged_reader
    reader.adapt(ReaderSettings(precision="fp32", padding=padding), seed=0)
    assert_anchor_and_answer_meet(reader)
    assert reader.bos_ids == ([2] if reader.name == "gemma3_270m" else [])
    assert reader.renderer.chat == (reader.name != "gemma3_270m")
    assert reader.text_prompt(TEXTS[0], "content_only") == reader.tokenizer(TEXTS[0]).input_ids + reader.anchor_ids

    texts = ("a much longer answer than that", "17")
    rows, answers = [reader.answer_ids(answer) for answer in texts], answers_of(reader, texts)
    assert len(rows[0]) > len(rows[1])
    for ids, labels, mask in zip(rows, answers.labels.tolist(), answers.attention_mask.tolist(), strict=True):
        padded = answers.labels.shape[1] - len(ids)
        # Where the pad token is the one that ends an answer, the end is a label all the same.
        assert labels == ids + [-100] * padded and mask == [1] * len(ids) + [0] * padded
    prompts = [reader.text_prompt(text) for text in TEXTS]
    batch = reader.text_embeddings(prompts)
    assert batch.attention_mask.sum(1).tolist() == [len(prompt) for prompt in prompts]
    expected = [naive_answer_logits(reader, prompt, one) for prompt, one in zip(prompts, texts, strict=True)]
    assert torch.allclose(reader.answer_logits(batch, answers), torch.cat(expected), atol=1e-4)
    for prompt in (batch, reader.prompt_embeddings(torch.randn(2, 3, reader.hidden_size))):
        reader.check_first_step(prompt, answers)


@pytest.mark.slow
def test_replaying_a_texts_own_embeddings_equals_the_text_arm_for_packaged_tokenizers(packaged_reader):
    packaged_reader.adapt(ReaderSettings(precision="fp32", text_prompt="content_only"), seed=0)
    assert_replay_equals_text(packaged_reader)


@pytest.fixture(params=PACKAGED)
def packaged(request: pytest.FixtureRequest) -> Path:
    """A real model's directory, where a run of the workflow has put it."""
    if not (MATERIALISED / request.param).is_dir():
        pytest.skip(f"resources/models/{request.param} is not there: `snakemake resources/models/{request.param}`")
    return MATERIALISED / str(request.param)


@pytest.mark.slow
def test_training_and_generation_agree_on_the_first_token_of_packaged_models(packaged):
    reader = Reader.load(packaged.name, packaged, ReaderSettings(precision="fp32"))
    torch.manual_seed(0)
    vectors = torch.randn(2, 3, reader.hidden_size) * reader.vocabulary_rms
    for padding in ("left", "right"):
        reader.adapt(ReaderSettings(precision="fp32", padding=padding), seed=0)
        texts = reader.text_embeddings([reader.text_prompt(text) for text in TEXTS])
        for prompt in (texts, reader.prompt_embeddings(vectors)):
            reader.check_first_step(prompt, answers_of(reader))


def test_an_anchor_that_joins_the_answer_is_refused(paths):
    reader = tiny_reader(paths, "llama", anchor="Answ")
    with pytest.raises(UserError, match="joins the anchor 'Answ' and the answer"):
        reader.answer_ids("er: 3")
    with pytest.raises(UserError, match="has no tokens"):
        tiny_reader(paths, "llama", anchor="  ")


def test_a_frozen_reader_has_nothing_to_train_and_stays_in_evaluation_mode(paths, family):
    reader = tiny_reader(paths, family).train()
    assert not any(parameter.requires_grad for parameter in reader.parameters())
    assert not reader.model.training


def test_texts_are_read_without_the_trained_parts_of_a_reader(paths):
    plain, adapted = tiny_reader(paths, "llama"), tiny_reader(paths, "llama", prefix_tuning=2, lora={"rank": 2})
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    answers = answers_of(plain)
    prompts = [plain.text_prompt(text) for text in TEXTS]
    expected = plain.answer_logits(plain.text_embeddings(prompts), answers)
    assert torch.equal(adapted.answer_logits(adapted.text_embeddings(prompts), answers), expected)
    vectors = torch.randn(2, 3, plain.hidden_size)
    after_prefix = [reader.answer_logits(reader.prompt_embeddings(vectors), answers) for reader in (plain, adapted)]
    assert not torch.allclose(*after_prefix, atol=1e-3)
    adapted.adapt(plain.settings, seed=0)
    assert torch.equal(adapted.answer_logits(adapted.prompt_embeddings(vectors), answers), after_prefix[0])
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_the_rms_of_embeddings_is_that_of_what_the_model_reads(paths, family):
    reader = tiny_reader(paths, family)
    weight = reader.model.get_input_embeddings().weight
    scale = reader.hidden_size**0.5 if family == "gemma" else 1.0
    assert reader.vocabulary_rms == pytest.approx(float(weight.square().mean().sqrt()) * scale, rel=1e-3)
    assert reader.embedding_rms([1, 1, 2]) == pytest.approx(
        float((weight[[1, 1, 2]] * scale).square().mean().sqrt()), rel=1e-3
    )


def test_the_first_tokens_switches_ban_the_end_and_draw_from_the_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(2000, 1))
    off = AnswerGenerationSettings()
    assert set(first_tokens(logits, (0,), off).tolist()) == {0}
    assert set(first_tokens(logits, (0,), off.model_copy(update={"ban_first_eos": True})).tolist()) == {1}
    drawn = first_tokens(logits, (), AnswerGenerationSettings(first_token_temperature=1.0, first_token_top_p=0.6))
    counts = drawn.bincount(minlength=4) / len(drawn)
    assert counts[2:].sum() == 0
    assert functional.l1_loss(counts[:2], torch.tensor([0.625, 0.375])) < 0.05
