"""Evaluation: scores against plain full passes, choice on validation, every control, and what is kept on the way."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.models.loading import frozen, load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, read_sealed_json, write_sealed_json
from stillhouse.studies.consistency_lens import activations, evaluate, samples_page
from stillhouse.studies.consistency_lens.data import CachedExamples
from stillhouse.studies.consistency_lens.evaluate import EvaluateStep
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.results import CONTROLS, Evaluation, diversity, load_evaluation
from stillhouse.studies.consistency_lens.samples_page import SamplesStep
from stillhouse.studies.consistency_lens.scoring import Variant, activations_of, best_of, reconstructions, score
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.corpus import activation_settings, extraction_step
from tests.consistency_lens.tiny_lens import evaluation_step, run_settings, train_lens


@dataclass(frozen=True)
class Finished:
    """A trained lens and its evaluation."""

    lens: Path
    activations: Path
    step: EvaluateStep
    evaluation: Evaluation


@pytest.fixture(scope="module")
def finished(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("evaluation")
    # A lens finds its activations by the name that its settings give them.
    named = folder / activation_settings().name
    shutil.copytree(artefacts.activations, named)
    lens = train_lens(artefacts, named, folder)
    step = evaluation_step(artefacts, named, (lens,), folder)
    evaluate.main(step)
    return Finished(lens, named, step, load_evaluation(folder / "results.json"))


def load_lens(artefacts: Artefacts, finished: Finished, step: int) -> Lens:
    return Lens.load(artefacts.model, finished.lens / f"checkpoint-{step}", run_settings().lens, "fp32")


def plain_logits(
    model: torch.nn.Module, token_ids: torch.Tensor, position: int, value: torch.Tensor, read: int | None = None
) -> torch.Tensor:
    """The original's logits with `value` after its first block at the position, by a full pass over the document.

    They are those at the position, or at `read`.
    """

    def put(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, position] = value
        return changed

    handle = model.model.layers[0].register_forward_hook(put)  # type: ignore[union-attr, index]
    try:
        return model(token_ids[None]).logits[0, position if read is None else read].detach()
    finally:
        handle.remove()


def test_scores_are_those_of_a_full_pass_with_the_activation_replaced(artefacts: Artefacts, finished: Finished) -> None:
    items = finished.evaluation.items.query("split == 'test'")
    [step] = items["step"].unique()
    lens, tokenizer = load_lens(artefacts, finished, step), load_tokenizer(artefacts.model)
    untrained = frozen(Lens.build(artefacts.model, run_settings().lens, "fp32"))
    model = AutoModelForCausalLM.from_pretrained(artefacts.model, dtype=torch.float32).eval()
    cached = CachedExamples(finished.activations, "test", activation_settings(), artefacts.model)
    train = CachedExamples(finished.activations, "train", activation_settings(), artefacts.model)
    mean = torch.stack([train[index].activation for index in range(len(train))]).mean(0)  # type: ignore[misc]
    for index in range(len(cached)):
        example = cached[index]
        activation = example.activation
        assert activation is not None
        text = lens.explain(activation[None], gumbel_noise=0.0).token_ids
        values = {"lens": lens.reconstruct_tokens(text)[0], "mean": mean, "zero": torch.zeros_like(mean)}
        other_text = untrained.explain(activation[None], gumbel_noise=0.0).token_ids
        values["untrained"] = untrained.reconstruct_tokens(other_text)[0]
        true = plain_logits(model, example.token_ids, example.position, activation).log_softmax(-1)
        for variant, value in values.items():
            other = plain_logits(model, example.token_ids, example.position, value.detach()).log_softmax(-1)
            row = items[(items.item_id == example.document_id) & (items.variant == variant)].iloc[0]
            assert row.kl == pytest.approx(float((true.exp() * (true - other)).sum()), abs=1e-5)
            assert row.squared_error == pytest.approx(float((value - activation).square().mean()), rel=1e-4)
            assert row.squared_deviation == pytest.approx(float((mean - activation).square().mean()), rel=1e-4)
            assert row.top1 == (true.argmax() == other.argmax())
        row = items[(items.item_id == example.document_id) & (items.variant == "lens")].iloc[0]
        assert row.text == tokenizer.decode(text[0]) and row.text_tokens == 3
        logits = model(text).logits[0, :-1].log_softmax(-1)
        expected = -logits.gather(1, text[0, 1:, None]).sum()
        assert row.text_nll == pytest.approx(expected.item(), rel=1e-4)


def test_a_perfect_reconstruction_changes_nothing(artefacts: Artefacts, finished: Finished) -> None:
    cached = CachedExamples(finished.activations, "test", activation_settings(), artefacts.model)
    examples = [cached[index] for index in range(len(cached))]
    lens, true = load_lens(artefacts, finished, 4), activations_of(examples)
    rows = score(lens, examples, [Variant("same", reconstructions=true)], true[0], load_tokenizer(artefacts.model), 5)
    assert rows["kl"].abs().max() < 1e-6
    assert rows["top1"].all() and (rows["squared_error"] == 0).all()


def test_every_control_is_scored_on_the_same_documents_as_the_lens(finished: Finished) -> None:
    items = finished.evaluation.items.query("split == 'test'")
    documents = set(items.query("variant == 'lens'").item_id)
    assert len(documents) == 8
    for variant in ("lens", *CONTROLS, "best_of_1", "best_of_3"):
        rows = items[items.variant == variant]
        assert set(rows.item_id) == documents and len(rows) == 8, variant
    measured = {one.variant: one for one in finished.evaluation.results.measurements if one.split == "test"}
    assert measured["mean"].recovered_from_mean.value == 0 == measured["zero"].recovered_from_zero.value
    lens = measured["lens"]
    assert lens.recovered_from_mean.value == pytest.approx(1 - lens.kl.value / measured["mean"].kl.value, rel=1e-5)
    assert lens.kl.low <= lens.kl.value <= lens.kl.high and lens.kl.n == 8


def test_the_texts_of_shuffled_and_other_are_the_lenss_own_in_another_order(finished: Finished) -> None:
    items = finished.evaluation.items.query("split == 'test'").set_index(["variant", "item_id"])["token_ids"]
    own, mixed, others = (items[variant].map(list) for variant in ("lens", "shuffled", "other_explanation"))
    assert own.map(sorted).equals(mixed.map(sorted))
    assert sorted(own) == sorted(others)


def test_another_seed_draws_other_controls_and_leaves_the_lens_as_it_is(
    artefacts: Artefacts, finished: Finished, tmp_path: Path
) -> None:
    changes = {"seed": finished.step.evaluation.seed + 1, "best_of": [1], "verbose_samples": 0}
    evaluate.main(evaluation_step(artefacts, finished.activations, (finished.lens,), tmp_path, **changes))
    again = load_evaluation(tmp_path / "results.json").items
    ours, theirs = (
        items.query("split == 'test'").set_index(["variant", "item_id"]).kl
        for items in (finished.evaluation.items, again)
    )
    for variant in ("lens", "mean", "hard_coded", "text_regression", "untrained"):
        assert ours[variant].equals(theirs[variant]), variant
    for variant in ("shuffled", "other_explanation", "best_of_1"):
        assert not ours[variant].equals(theirs[variant]), variant


def test_the_checkpoint_is_chosen_on_validation_alone(finished: Finished) -> None:
    results = finished.evaluation.results
    validated = {
        one.step: one.kl.value for one in results.measurements if (one.split, one.variant) == ("validation", "lens")
    }
    assert sorted(validated) == [2, 4]
    [chosen] = results.selections
    assert validated[chosen.step] == min(validated.values())
    assert {one.step for one in results.measurements if one.split == "test"} == {chosen.step}


def test_more_samples_never_make_the_best_reconstruction_worse(artefacts: Artefacts, finished: Finished) -> None:
    cached = CachedExamples(finished.activations, "test", activation_settings(), artefacts.model)
    true = activations_of([cached[index] for index in range(len(cached))])
    lens = load_lens(artefacts, finished, 4)
    errors = {
        k: (reconstructions(lens, texts, 8) - true).square().sum(1)
        for k, texts in best_of(lens, true, (1, 2, 4), 3, seed=7).items()
    }
    assert (errors[2] <= errors[1] + 1e-5).all() and (errors[4] <= errors[2] + 1e-5).all()
    assert errors[4].sum() < errors[1].sum()
    again = best_of(lens, true, (1, 2, 4), 3, seed=7)
    torch.testing.assert_close((reconstructions(lens, again[4], 8) - true).square().sum(1), errors[4])


def test_a_second_run_computes_nothing_and_gives_the_same(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "score", None)
    step = finished.step.model_copy(
        update={name: tmp_path / name for name in ("item_scores", "samples", "table", "record")}
        | {"results": tmp_path / "results.json"}
    )
    evaluate.main(step)
    assert step.results.read_bytes() == finished.step.results.read_bytes()
    assert step.samples.read_bytes() == finished.step.samples.read_bytes()
    assert read_json(step.record)["parts_computed"] == 0


def test_the_number_of_batches_limits_the_documents(artefacts: Artefacts, finished: Finished, tmp_path: Path) -> None:
    lenses = (finished.lens,)
    step = evaluation_step(artefacts, finished.activations, lenses, tmp_path, batches=1, split="validation")
    evaluate.main(step)
    items = load_evaluation(tmp_path / "results.json").items
    assert set(items.split) == {"validation"} and items.item_id.nunique() == 3
    assert not items.duplicated(["step", "variant", "item_id"]).any()


def test_other_activations_are_scored_and_those_of_another_layer_refused(
    artefacts: Artefacts, finished: Finished, tmp_path: Path
) -> None:
    lenses, longer = (finished.lens,), activation_settings(max_length=20)
    activations.main(extraction_step(artefacts.model, artefacts.tokens, tmp_path / "other", activations=longer))
    step = evaluation_step(
        artefacts, finished.activations, lenses, tmp_path, other_activations=tmp_path / "other", best_of=[]
    )
    evaluate.main(step)
    ours = finished.evaluation.items.query("split == 'test' and variant == 'lens'").set_index("item_id").kl
    rows = load_evaluation(tmp_path / "results.json").items
    theirs = rows.query("split == 'test' and variant == 'lens'").set_index("item_id").kl
    assert sorted(ours.index) == sorted(theirs.index) and not ours.equals(theirs[ours.index])
    deeper = activation_settings(layer=2)
    activations.main(extraction_step(artefacts.model, artefacts.tokens, tmp_path / "deep", activations=deeper))
    step = evaluation_step(artefacts, finished.activations, lenses, tmp_path, other_activations=tmp_path / "deep")
    with pytest.raises(UserError, match="deep: is of layer 2"):
        evaluate.main(step)


def test_identical_texts_show_as_collapse() -> None:
    collapsed, varied = diversity([[5, 5, 5]] * 4), diversity([[1, 2, 3], [4, 5, 6]])
    assert collapsed.distinct_texts == 0.25 and collapsed.most_common_token == 1.0
    assert collapsed.repeated_within == pytest.approx(2 / 3)
    assert varied.distinct_texts == varied.distinct_tokens == 1.0 and varied.repeated_within == 0


def test_the_samples_page_shows_token_explanation_predictions_and_continuations(
    finished: Finished, tmp_path: Path
) -> None:
    samples_page.main(SamplesStep(samples=finished.step.samples, output=tmp_path / "samples.html"))
    page = (tmp_path / "samples.html").read_text()
    [lens] = read_json(finished.step.samples)["lenses"]
    assert len(lens["samples"]) == page.count("<article>") == 2
    for sample in lens["samples"]:
        assert len(sample["original"]) == len(sample["reconstruction"]) == 3
        total = sum(prediction["probability"] for prediction in sample["original"])
        assert 0 < total <= 1
    assert page.count("<mark>") == 2 and page.count("continues:") == 4
    assert not re.search(r"https?:|<script|<link|<img", page)


def test_a_sample_tells_what_plain_passes_over_its_document_find(
    artefacts: Artefacts, finished: Finished, tmp_path: Path
) -> None:
    [shown] = read_json(finished.step.samples)["lenses"]
    sample = shown["samples"][1]
    example = CachedExamples(finished.activations, "test", activation_settings(), artefacts.model)[1]
    lens, tokenizer = load_lens(artefacts, finished, shown["step"]), load_tokenizer(artefacts.model)
    model = AutoModelForCausalLM.from_pretrained(artefacts.model, dtype=torch.float32).eval()
    ids, place, activation = example.token_ids, example.position, example.activation
    assert activation is not None
    text = lens.explain(activation[None], gumbel_noise=0.0).token_ids
    rebuilt = lens.reconstruct_tokens(text)[0].detach()
    assert sample["document_id"] == example.document_id
    parts = [tokenizer.decode(part) for part in (ids[:place], ids[place : place + 1], ids[place + 1 :])]
    assert [sample["before"], sample["token"], sample["after"]] == parts and all(parts)
    assert sample["explanation"] == tokenizer.decode(text[0])

    def continuation(value: torch.Tensor) -> str:
        document = ids[: place + 1]
        for _ in range(4):
            last = plain_logits(model, document, place, value, read=-1).argmax()
            document = torch.cat([document, last[None]])
        return tokenizer.decode(document[place + 1 :])

    page_step = SamplesStep(samples=finished.step.samples, output=tmp_path / "samples.html")
    samples_page.main(page_step)
    article = page_step.output.read_text().split("<article>")[2]
    halves = article.partition("With the reconstruction")
    for half, name, value in ((halves[0], "original", activation), (halves[2], "reconstruction", rebuilt)):
        top = plain_logits(model, ids, place, value).softmax(-1).topk(3)
        assert [one["token"] for one in sample[name]] == [tokenizer.decode(token) for token in top.indices]
        assert [one["probability"] for one in sample[name]] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert sample[f"{name}_continuation"] == continuation(value)
        cells = re.findall(r'<td><code>(.*?)</code></td><td class="number">(.*?)</td>', half, re.DOTALL)
        assert cells == [(escape(one["token"]), f"{one['probability']:.1%}") for one in sample[name]]
        assert f"continues: <code>{escape(sample[f'{name}_continuation'])}</code>" in half
    assert sample["original"] != sample["reconstruction"]
    assert sample["original_continuation"] != sample["reconstruction_continuation"]
    assert f"<mark>{escape(sample['token'])}</mark>" in article
    assert f"<q>{escape(sample['explanation'])}</q>" in article


def test_text_of_the_model_never_becomes_markup(finished: Finished, tmp_path: Path) -> None:
    file = read_sealed_json(finished.step.samples)
    first = file["lenses"][0]["samples"][0]
    file["lenses"][0]["samples"][0] = first | {"explanation": "<script>x</script>", "token": "&lt;"}
    write_sealed_json(tmp_path / "samples.json", file)
    samples_page.main(SamplesStep(samples=tmp_path / "samples.json", output=tmp_path / "samples.html"))
    page = (tmp_path / "samples.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;x" in page and "<mark>&amp;lt;</mark>" in page


def test_the_samples_reach_tensorboard_as_a_table(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = finished.step.table.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    [tag] = log.Tags()["tensors"]
    text = log.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    [lens] = read_json(finished.step.samples)["lenses"]
    assert tag.startswith("samples") and lens["samples"][0]["document_id"] in text


def test_a_lens_without_its_activations_is_refused(artefacts: Artefacts, finished: Finished, tmp_path: Path) -> None:
    step = evaluation_step(artefacts, artefacts.activations, (finished.lens,), tmp_path)
    with pytest.raises(UserError, match=r"there is no activations 'layer_1-random-\w+' of this lens"):
        evaluate.main(step)


def test_items_of_several_seeds_share_their_documents(artefacts: Artefacts, finished: Finished, tmp_path: Path) -> None:
    second = train_lens(artefacts, finished.activations, tmp_path, seed=2)
    step = evaluation_step(artefacts, finished.activations, (finished.lens, second), tmp_path)
    evaluate.main(step)
    items = load_evaluation(tmp_path / "results.json").items.query("split == 'test' and variant == 'lens'")
    by_seed = {seed: set(group.item_id) for seed, group in items.groupby("seed")}
    assert by_seed.keys() == {1, 2} and by_seed[1] == by_seed[2]
