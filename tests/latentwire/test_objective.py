"""The loss: against a naive one, example by example; the same for any micro-batch, order of readers and teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latentwire.tiny_readers import FAMILIES, make_families, tiny_reader
from torch.nn import functional

from stillhouse.data.records import write_records
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.data import WireBatch, WireData, wire_example
from stillhouse.studies.latentwire.objective import LatentWireObjective, autoscale
from stillhouse.studies.latentwire.prompt import Prefix
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.text_teacher import CachedTeacher, OnlineTeacher, TextTeacherStep, main
from tests.latentwire.tiny_study import questions, run_settings

ANSWERS = ("1", "2 more apples", "she buys 3 apples more than before", "4", "5 more")
RECORDS = [replace(record, answers=(answer,)) for record, answer in zip(questions(5), ANSWERS, strict=True)]
EXAMPLES = [wire_example(record) for record in RECORDS]
EVERYTHING = {
    "ce": 1.0,
    "first_token": 0.5,
    "first_k": 0.3,
    "k": 2,
    "kd": 0.7,
    "temperature": 2.0,
    "state_kd": 0.2,
    "scale": 0.1,
    "rms": 0.1,
    "gist": 0.1,
    "gist_bytes": 8,
}
ONLINE = {"targets": "online", "batch_tokens": 64}
Build = Callable[..., tuple[Channel, LatentWireObjective, WireBatch]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def readers(paths: dict[str, Path]) -> dict[str, Reader]:
    return {family: tiny_reader(paths, family) for family in FAMILIES}


@pytest.fixture
def build(readers: dict[str, Reader]) -> Build:
    """A channel away from its start, its objective with teachers in the step, and one batch of everything."""

    def make(**changes: object) -> tuple[Channel, LatentWireObjective, WireBatch]:
        run = run_settings(**{"losses": EVERYTHING, "teacher": ONLINE} | changes)
        channel = Channel.build(run, readers, seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in channel.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        objective = LatentWireObjective(run, {name: OnlineTeacher(readers[name], 64) for name in FAMILIES})
        return channel.train(), objective, data_of(readers).batch(range(len(EXAMPLES)))

    return make


def data_of(readers: dict[str, Reader]) -> WireData:
    return WireData(EXAMPLES, {name: reader.answer_ids for name, reader in readers.items()})


def gradients(channel: Channel) -> dict[str, torch.Tensor]:
    found = {
        name: value.grad if value.grad is not None else torch.zeros_like(value)
        for name, value in channel.named_parameters()
        if value.requires_grad
    }
    channel.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=atol, msg=lambda text, name=name: name + text)


def naive_loss(channel: Channel, readers: dict[str, Reader]) -> torch.Tensor:
    """Each example and reader alone, in plain arithmetic on token ids and single positions."""
    total = torch.zeros(())
    settings = channel.run.losses
    for example in EXAMPLES:
        message = channel.encoder([example.text])
        latents = channel.latents(message)
        for name, reader in readers.items():
            adapter = channel.adapters[name]
            raw = adapter(latents.of_model(name))
            rms = raw.square().mean().sqrt()
            prefix = raw * adapter.target_rms / rms * adapter.scale
            answer = reader.answer_ids(example.answer)
            start, anchor = (reader.embed(ids) for ids in (reader.bos_ids, reader.anchor_ids))
            inputs = torch.cat([start, prefix[0], anchor, reader.embed(answer)])[None]
            output = reader.model(inputs_embeds=inputs, output_hidden_states=True)
            first = inputs.shape[1] - len(answer) - 1
            logits, hidden = output.logits[0, first:-1], output.hidden_states[-1][0, first:-1]
            nll = functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
            text = reader.text_prompt(example.text)
            taught = reader.model(input_ids=torch.tensor([[*text, *answer]]), output_hidden_states=True)
            teacher_logits = taught.logits[0, len(text) - 1 : -1].detach()
            teacher_hidden = taught.hidden_states[-1][0, len(text) - 1 : -1].detach()
            tau, k = settings.temperature, min(settings.k, len(answer))
            p, q = (teacher_logits / tau).softmax(-1), (logits / tau).log_softmax(-1)
            kl = tau**2 * (p * (p.log() - q)).sum(-1)
            distance = (hidden - teacher_hidden).square().sum(-1) / teacher_hidden.square().sum(-1)
            own = (
                settings.ce * nll.mean()
                + settings.first_token * nll[0]
                + settings.first_k * nll[:k].mean()
                + settings.kd * kl[:k].mean()
                + settings.state_kd * distance[:k].mean()
                + settings.scale * (adapter.scale - 1) ** 2
                + settings.rms * (rms / adapter.target_rms).log() ** 2
            )
            total = total + own / len(readers)
        assert channel.gist is not None
        data = torch.tensor(list(example.text.encode()[: settings.gist_bytes]))
        total = total + settings.gist * functional.cross_entropy(channel.gist(message)[0], data)
    return total


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_and_its_gradient_equal_the_naive_form(build, readers, padding):
    channel, objective, batch = build(reader={"precision": "fp32", "padding": padding})
    terms = objective(channel, batch, step=1)
    terms.total.backward()
    fast = gradients(channel)
    naive = naive_loss(channel, readers)
    naive.backward()
    assert terms.count == len(EXAMPLES)
    torch.testing.assert_close(terms.total, naive, rtol=1e-4, atol=1e-4)
    assert_same(fast, gradients(channel))
    assert {"ce/llama", "kd/gemma", "first_token_accuracy/llama", "ce/gist"} <= terms.terms.keys()


def test_models_one_after_the_other_have_the_same_loss_and_gradient(build):
    results = []
    for sequential in (False, True):
        channel, objective, batch = build(sequential_models=sequential)
        terms = objective(channel, batch, step=1)
        terms.total.backward()
        results.append((terms, gradients(channel)))
    (joint, together), (sequential, apart) = results
    torch.testing.assert_close(joint.total, sequential.total, rtol=1e-6, atol=1e-6)
    assert joint.terms.keys() == sequential.terms.keys()
    for name, value in joint.terms.items():
        torch.testing.assert_close(value, sequential.terms[name])
    assert_same(together, apart, atol=1e-6)


def test_models_one_after_the_other_keep_one_models_activations_at_a_time(build, monkeypatch):
    """What the encoder's backward pass finds is a product with Z; the readers' graphs are gone by then."""
    channel, objective, batch = build(sequential_models=True)
    calls = []
    original = Reader.answer_rows

    def counted(self, prompt, answers):
        calls.append((self.name, any(value.grad is not None for value in channel.adapters["llama"].parameters())))
        return original(self, prompt, answers)

    monkeypatch.setattr(Reader, "answer_rows", counted)
    objective(channel, batch, step=1)
    taught = [call for call in calls if call[0] == "gemma"]
    assert taught and all(first_is_done for _, first_is_done in taught)


def test_micro_batches_change_nothing(build, readers):
    channel, objective, batch = build()
    whole = objective(channel, batch, step=1)
    whole.total.backward()
    expected, parts, count = gradients(channel), torch.zeros(()), 0
    for micro_batch in data_of(readers).micro_batches(range(len(EXAMPLES)), token_budget=250):
        terms = objective(channel, micro_batch, step=1)
        terms.total.backward()
        parts, count = parts + terms.total.detach(), count + terms.count
        assert terms.count < len(EXAMPLES)
    assert count == len(EXAMPLES)
    torch.testing.assert_close(parts, whole.total.detach(), rtol=1e-5, atol=1e-5)
    assert_same(gradients(channel), expected)


def test_a_cached_text_teacher_gives_the_loss_and_gradient_of_the_teacher_in_the_step(
    build, paths, readers, tmp_path, monkeypatch
):
    channel, objective, batch = build()
    online = objective(channel, batch, step=1)
    online.total.backward()
    expected = gradients(channel)
    data = tmp_path / "data"
    data.mkdir()
    write_records(data / "train.jsonl", RECORDS)
    write_manifest(data)
    cached = {}
    for name in FAMILIES:
        cache = run_settings(losses=EVERYTHING).cache
        assert cache is not None
        output = tmp_path / name
        step = TextTeacherStep(
            model=paths[name], data=data, output=output, work=tmp_path / "work", name=name, cache=cache
        )
        main(step)
        cached[name] = CachedTeacher(output, readers[name])
    monkeypatch.setattr(Reader, "text_embeddings", None)  # no forward pass on a text any more
    terms = LatentWireObjective(channel.run, cached)(channel, batch, step=1)
    terms.total.backward()
    torch.testing.assert_close(terms.total, online.total, rtol=1e-5, atol=1e-5)
    assert_same(gradients(channel), expected)


def test_padding_has_no_part_in_the_loss(build, readers):
    """Whatever stands under the padding of a batch, in ids, is neither label nor context."""
    channel, objective, batch = build()
    expected = objective(channel, batch, step=1).total
    for target in batch.targets.values():
        padding = target.attention_mask == 0
        assert padding.any()
        assert (target.labels[padding] == -100).all()
        target.input_ids[padding] = 7
    torch.testing.assert_close(objective(channel, batch, step=1).total, expected, rtol=1e-6, atol=1e-6)


def test_only_trained_parts_get_gradients(build):
    channel, objective, batch = build()
    objective(channel, batch, step=1).total.backward()
    for name, parameter in channel.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("readers.")), name


@pytest.mark.parametrize(
    "reader",
    [{"lora": {"rank": 2}}, {"prefix_tuning": 2}, {"deep_prefix": True}, {"lora": {"rank": 2}, "prefix_tuning": 1}],
)
def test_optional_parts_of_readers_learn_and_the_teacher_does_not_see_them(build, readers, reader):
    channel, objective, batch = build(reader={"precision": "fp32", **reader})
    terms = objective(channel, batch, step=1)
    terms.total.backward()
    learned = [name for name, value in channel.named_parameters() if value.requires_grad]
    reached = {name for name, value in channel.named_parameters() if value.grad is not None and value.grad.any()}
    assert set(learned) - reached == set()
    plain = OnlineTeacher(tiny := readers["llama"], 64).hidden(batch)
    channel.reader("llama").adapt(run_settings().reader, 0)
    torch.testing.assert_close(OnlineTeacher(tiny, 64).hidden(batch), plain)


def test_the_warm_up_shows_ever_less_of_the_text(build, readers):
    _, objective, batch = build(curriculum={"text_warmup": 0.5}, training={"steps": 8, "schedule": {"warmup_steps": 0}})
    reader = readers["gemma"]
    lengths = [[len(ids) for ids in objective.texts_before(reader, batch, step)] for step in range(1, 9)]
    full = [len(reader.text_ids(text)) for text in batch.texts]
    assert lengths[0] == full
    assert all(all(less < more for less, more in zip(lengths[i + 1], lengths[i], strict=True)) for i in range(3))
    assert lengths[4:] == [[]] * 4


def test_dropped_vectors_follow_their_schedule_and_one_always_stays(build):
    _, objective, _ = build(
        curriculum={"latent_dropout": 0.8, "latent_dropout_end": 0.0},
        training={"steps": 10, "schedule": {"warmup_steps": 0}},
    )
    latents = torch.zeros(4000, 5, 8)
    seen = [objective.visible(latents, step).float() for step in (1, 5, 10)]
    assert all((mask.sum(1) >= 1).all() for mask in seen)
    shares = [mask.mean().item() for mask in seen]
    assert shares[2] == 1.0
    assert shares[1] == pytest.approx(0.6, abs=0.03)
    assert shares[0] == pytest.approx(0.28 + 0.72**5 / 5, abs=0.03)


def test_a_vector_that_is_dropped_gets_no_gradient(build, monkeypatch):
    channel, objective, batch = build(losses={"ce": 1.0})
    masks = {}

    def last_dropped(self, latents, step):
        mask = torch.ones(latents.shape[:2], dtype=torch.long)
        mask[:, -1] = 0
        return mask

    def remembered(self, prefix, texts=()):
        masks[self.name] = prefix.embeddings
        prefix.embeddings.retain_grad()
        return original(self, Prefix(prefix.embeddings, prefix.mask, prefix.layers), texts)

    original = Reader.prompt_embeddings
    monkeypatch.setattr(LatentWireObjective, "visible", last_dropped)
    monkeypatch.setattr(Reader, "prompt_embeddings", remembered)
    objective(channel, batch, step=1).total.backward()
    for embeddings in masks.values():
        assert not embeddings.grad[:, -1].any() and embeddings.grad[:, :-1].any()


def test_a_vector_that_is_dropped_changes_nothing_of_the_loss(build, monkeypatch):
    """Not through a deep prefix, FiLM, the calibration or a penalty either."""
    channel, objective, batch = build(
        reader={"precision": "fp32", "deep_prefix": True},
        adapter={"film": True},
        losses={"ce": 1.0, "rms": 0.1, "scale": 0.1},
    )
    for adapter in channel.adapters.values():
        torch.nn.init.normal_(adapter.film.weight)

    def last_dropped(self, latents, step):
        mask = torch.ones(latents.shape[:2], dtype=torch.long)
        mask[:, -1] = 0
        return mask

    monkeypatch.setattr(LatentWireObjective, "visible", last_dropped)
    message = channel.encoder(batch.texts).detach().requires_grad_()
    for name in FAMILIES:
        loss = objective.reader_loss(channel, name, channel.latents(message), batch, step=1)
        (gradient,) = torch.autograd.grad(loss.total.sum(), message)
        assert gradient[:, :-1].any() and not gradient[:, -1].any(), name


def test_the_first_tokens_weight_follows_its_difficulty(build):
    terms = {"first_token": torch.tensor([2.0, 100.0, 0.0]), "ce": torch.tensor([1.0, 1.0, 1.0])}
    assert autoscale(terms).tolist() == [2.0, 4.0, 0.25]
    losses = {"ce": 0.0, "first_token": 0.5}
    plain, scaled = ({**losses, "first_token_autoscale": on} for on in (False, True))
    results = []
    for setting in (plain, scaled):
        channel, objective, batch = build(losses=setting)
        results.append(objective(channel, batch, step=1))
    assert results[0].terms["first_token/llama"] == results[1].terms["first_token/llama"]
    assert not torch.allclose(results[0].total, results[1].total)


def test_diagnostics_look_once_in_each_of_their_steps(build):
    looks = []
    channel, objective, batch = build(diagnostics_every=3)
    objective.observe = lambda channel, step: looks.append(step)
    for step in range(1, 8):
        for _ in range(2):
            objective(channel, batch, step)
    assert looks == [3, 6]


def test_distillation_without_a_teacher_is_a_defect():
    with pytest.raises(ValueError, match="need a teacher"):
        LatentWireObjective(run_settings(losses={"kd": 1.0}))
