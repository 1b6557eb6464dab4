"""The arms: what each gives a reader, and that replayed embeddings are the text itself."""

from __future__ import annotations

import pytest
import torch

from stillhouse.studies.latentwire.arms import present_replay, present_texts, text_prompt
from stillhouse.studies.latentwire.compression import compress_to_bytes, decompress
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import WireExample, answer_tokens, question_text, wire_text
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.scoring import ScoringSettings, candidate_nll, score_items
from tests.latentwire.tiny_readers import FAMILIES, make_families, tiny_reader

QUESTION = "How many apples does Ada buy?"
EXAMPLES = [
    WireExample(f"q{n}", "T", wire_text(QUESTION, "Ada has 3 apples. " * n + f"She buys {n} more."), QUESTION, answers)
    for n, answers in ((1, ("1", "1 more")), (4, ("4 more",)), (2, ("2",)))
]
GENERATION = AnswerGenerationSettings(max_new_tokens=5)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    paths = make_families(tmp_path_factory.mktemp("models"))
    return {family: tiny_reader(paths, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ["full_text", "replay_raw", "replay_anchor"])
def test_a_text_and_its_replayed_embeddings_give_what_the_plain_model_gives_for_its_tokens(
    readers: dict[str, Reader], family: str, arm: str
) -> None:
    reader = readers[family]
    if arm == "replay_anchor":
        # Where latents stand there is no chat template around the text.
        reader.settings = reader.settings.model_copy(update={"text_prompt": "content_only"})
    prompts = [text_prompt("full_text", reader, example) for example in EXAMPLES]
    presentation = (
        present_texts(reader, prompts) if arm == "full_text" else present_replay(arm, reader, EXAMPLES)  # type: ignore[arg-type]
    )
    scores = score_items(reader, EXAMPLES, presentation, ScoringSettings(2, GENERATION))
    for index, (example, prompt) in enumerate(zip(EXAMPLES, prompts, strict=True)):
        answer = reader.answer_ids(example.answer)
        ids = torch.tensor([[*prompt.ids, *answer]])
        with torch.no_grad():
            rows = reader.model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
        assert scores[index].gold_nll == pytest.approx(-rows.gather(1, ids[0, len(prompt.ids) :, None]).sum(), rel=1e-4)
        assert scores[index].gold_tokens == len(answer)
        assert scores[index].first_token == rows[0].argmax()
        firsts = {reader.answer_ids(gold)[0] for gold in example.answers}
        order = rows[0].argsort(descending=True).tolist()
        assert scores[index].first_token_rank == min(order.index(token) for token in firsts) + 1
        written = reader.model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=5, do_sample=False, eos_token_id=list(reader.stop_ids)
        )[0, len(prompt.ids) :]
        text = reader.tokenizer.decode(written, skip_special_tokens=True)
        assert scores[index].output == text.strip().partition("\n")[0].strip()
    reader.settings = reader.settings.model_copy(update={"text_prompt": "auto"})


def test_calibrated_replay_keeps_each_text_to_itself(readers: dict[str, Reader]) -> None:
    def halved(rows: torch.Tensor) -> torch.Tensor:
        assert rows.shape[0] == 1 and rows.abs().sum(-1).min() > 0  # one text, no padding
        return rows / 2

    reader = readers["gemma"]
    prompt = present_replay("replay_adapter", reader, EXAMPLES, halved).render([0, 1])
    whole = present_replay("replay_anchor", reader, EXAMPLES).render([0, 1])
    start = len(reader.bos_ids)
    last = slice(-len(reader.anchor_ids) - 3, -len(reader.anchor_ids))
    assert torch.allclose(prompt.inputs_embeds[:, last], whole.inputs_embeds[:, last] / 2)
    assert torch.equal(prompt.inputs_embeds[1, :start], whole.inputs_embeds[1, :start])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_budgets_cut_the_content_or_the_whole_chat_prompt(readers: dict[str, Reader], family: str) -> None:
    reader, text = readers[family], EXAMPLES[1].text
    cut = text_prompt("token_budget_content_only", reader, EXAMPLES[1], budget=7)
    assert list(cut.ids) == [*reader.bos_ids, *reader.text_ids(text)[:7], *reader.anchor_ids]
    assert (cut.content, cut.bytes) == (7, None)
    if family == "llama":
        chat = text_prompt("token_budget_chat_full", reader, EXAMPLES[1], budget=7)
        assert list(chat.ids) == [*reader.renderer.prompt_ids(text)[:7], *reader.anchor_ids]
        whole = text_prompt("token_budget_chat_full", reader, EXAMPLES[1], budget=10_000)
        assert list(whole.ids) == reader.text_prompt(text, "chat_full")


def test_byte_budgets_send_what_they_say_and_the_reader_gets_exactly_that(readers: dict[str, Reader]) -> None:
    reader, example = readers["llama"], EXAMPLES[1]
    for budget in (20, 60, 10_000):
        cut = text_prompt("byte_budget_cut", reader, example, budget)
        sent = example.text.encode()[:budget]
        assert cut.bytes == len(sent) and list(cut.ids) == reader.text_prompt(sent.decode())
        packed = text_prompt("byte_budget_compressed", reader, example, budget)
        message = compress_to_bytes(example.text, budget)
        assert packed.bytes == len(message) <= budget
        assert list(packed.ids) == reader.text_prompt(decompress(message))
    assert cut.ids == packed.ids == text_prompt("full_text", reader, example).ids


def test_no_context_is_the_question_as_every_text_begins(readers: dict[str, Reader]) -> None:
    reader = readers["gemma"]
    prompt = text_prompt("no_context", reader, EXAMPLES[0])
    assert list(prompt.ids) == reader.text_prompt(question_text(QUESTION))
    assert EXAMPLES[0].text.startswith(question_text(QUESTION))
    with pytest.raises(ValueError, match="latent is no text arm"):
        text_prompt("latent", reader, EXAMPLES[0])


def test_batches_and_order_do_not_change_a_score(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    presentation = present_texts(reader, [text_prompt("full_text", reader, example) for example in EXAMPLES])
    alone = score_items(reader, EXAMPLES, presentation, ScoringSettings(1, GENERATION))
    together = score_items(reader, EXAMPLES, presentation, ScoringSettings(3, GENERATION))
    for index in range(len(EXAMPLES)):
        assert alone[index].output == together[index].output
        assert alone[index].gold_nll == pytest.approx(together[index].gold_nll, rel=1e-4)
    assert set(score_items(reader, EXAMPLES, presentation, ScoringSettings(2, None), {1})) == {1}


def test_the_nll_of_a_candidate_is_per_token_with_its_end(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    presentation = present_texts(reader, [text_prompt("full_text", reader, example) for example in EXAMPLES])
    found = candidate_nll(reader, presentation, [example.answer for example in EXAMPLES], batch_size=2)
    gold = score_items(reader, EXAMPLES, presentation, ScoringSettings(3, None))
    assert found == pytest.approx([gold[n].gold_nll / gold[n].gold_tokens for n in range(3)], rel=1e-4)
    assert answer_tokens([reader.answer_ids(EXAMPLES[0].answer)]).tokens == gold[0].gold_tokens
