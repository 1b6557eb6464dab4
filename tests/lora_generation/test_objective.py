"""The loss: each distance against a naive form, sizes that mean the same everywhere, and gauges that do not matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.models.lora_tensors import AdapterTensors
from stillhouse.studies.lora_generation.delta_cache import DeltaCache
from stillhouse.studies.lora_generation.examples import AdapterExamples, GeneratorBatch, rows_of
from stillhouse.studies.lora_generation.generator_settings import (
    GeneratorSettings,
    LossSettings,
    TextSettings,
    TokenSettings,
)
from stillhouse.studies.lora_generation.generators import Generated, Generator, GeneratorPlan
from stillhouse.studies.lora_generation.objective import GeneratorObjective, Sizes
from stillhouse.studies.lora_generation.teacher_settings import ShardSettings
from stillhouse.studies.lora_generation.text_encoder import PromptEncoder
from tests.lora_generation.conftest import TinyStudy

SHARDS = ShardSettings(shards=4, validation_shards=1, held_out_shards=1)
READ = 3


class Setting:
    """Everything that a loss needs, on the tiny collection."""

    def __init__(self, study: TinyStudy, cache: Path) -> None:
        deltas = DeltaCache.load(study.deltas)
        self.behaviour = deltas.behaviour(study.model)
        encoder = PromptEncoder(study.encoder, TextSettings(), cache)
        rows = rows_of(study.adapters, "train", SHARDS, ())
        self.data = AdapterExamples(study.adapters, rows, deltas, encoder, READ, self.behaviour.probes.tokens)
        self.sizes = Sizes.of(self.data)

    def generator(self, guided: bool = False, **settings: Any) -> Generator:
        torch.manual_seed(0)
        generator = Generator(
            GeneratorPlan(
                generator=GeneratorSettings.model_validate({"prompts": READ, "width": 16, "layers": 1} | settings),
                tokens=TokenSettings(rows=2, columns=10),
                layout=self.data.layout,
                base_model="tiny",
                text_key="",
                vectors=1,
                width=16,
                guide=32 if guided else None,
            )
        )
        generator.fit(self.data.adapters(), self.data.deltas, self.data.conditions)
        return generator

    def objective(self, seed: int = 0, **losses: Any) -> GeneratorObjective:
        return GeneratorObjective(LossSettings(**losses), self.behaviour, self.sizes, READ, seed)

    def batch(self, *places: int) -> GeneratorBatch:
        [batch] = self.data.micro_batches(places, 10**6)
        return batch


class Fixed(Generator):
    """A generator that gives one adapter, whatever it reads."""

    def __init__(self, like: Generator, adapter: AdapterTensors) -> None:
        super().__init__(like.plan)
        self.tokeniser, self.adapter = like.tokeniser, adapter

    def forward(self, conditions: Tensor) -> Generated:
        return Generated(self.adapter.map(lambda tensor: tensor.expand(len(conditions), *tensor.shape)))


@pytest.fixture(scope="module")
def setting(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_study, tmp_path_factory.mktemp("embeddings"))


def test_each_distance_equals_its_definition(setting: Setting) -> None:
    model, batch = setting.generator(), setting.batch(0, 3)
    terms = setting.objective(weight=1, delta=0.5).validation(model, batch)
    made = model(batch.conditions[:, :READ]).adapter
    names = [module.name for module in setting.data.layout.modules]
    delta_w = sum(
        (made.delta_w(name) - batch.adapters.delta_w(name)).square().sum((1, 2)) for name in names
    ) / torch.tensor(setting.sizes.weight)
    own = setting.behaviour.delta(made)
    delta = (own - batch.deltas).square().sum(1) / setting.sizes.delta
    torch.testing.assert_close(terms.terms["delta_w"], delta_w.sum().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.terms["delta"], delta.sum().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.total, (delta_w + 0.5 * delta).sum().detach(), rtol=1e-4, atol=1e-5)
    encoded = [model.tokeniser.encode(adapter) for adapter in (made, batch.adapters)]
    squares = (encoded[0] - encoded[1]).square()
    matrices = sum(one[~one.isnan()].mean() for one in squares)
    torch.testing.assert_close(terms.terms["matrices"], matrices.detach(), rtol=1e-4, atol=1e-5)
    assert terms.count == 2


def test_a_teacher_is_at_no_distance_from_itself(setting: Setting) -> None:
    batch = setting.batch(2)
    terms = setting.objective(delta_kind="cosine").validation(Fixed(setting.generator(), batch.adapters[0]), batch)
    assert {name: abs(value.item()) < 1e-4 for name, value in terms.terms.items()} == dict.fromkeys(
        ("delta_w", "matrices", "delta", "cosine_distance", "norm"), True
    )


def test_no_adapter_at_all_is_at_distance_one_on_average(setting: Setting) -> None:
    nothing = Fixed(setting.generator(), setting.data[0].map(torch.zeros_like))
    terms = setting.objective().validation(nothing, setting.batch(*range(len(setting.data))))
    means = {name: value.item() / len(setting.data) for name, value in terms.terms.items()}
    assert means["delta_w"] == pytest.approx(1, rel=1e-4)
    assert means["delta"] == pytest.approx(1, rel=1e-3)


def test_the_factors_of_a_product_are_nothing_to_the_loss_on_it(setting: Setting) -> None:
    model, batch = setting.generator(), setting.batch(1)
    mixing = torch.tensor([[1.0, 0.7], [-0.4, 1.2]])
    teacher = batch.adapters
    other = AdapterTensors(
        {name: mixing.inverse() @ a for name, a in teacher.a.items()},
        {name: b @ mixing for name, b in teacher.b.items()},
        teacher.layout,
    )
    objective = setting.objective(weight=1, delta=0)
    terms, mixed = objective(model, batch, 1), objective(model, replace(batch, adapters=other), 1)
    torch.testing.assert_close(terms.total, mixed.total, rtol=1e-4, atol=1e-5)
    assert abs(terms.terms["matrices"] - mixed.terms["matrices"]) > 0.1


@pytest.mark.parametrize(
    "losses",
    [
        {"weight": 1, "delta": 0},
        {"weight": 1, "delta": 0, "weight_kind": "matrices"},
        {"weight": 0, "delta": 1},
        {"weight": 0, "delta": 1, "delta_kind": "cosine"},
        {"weight": 1, "delta": 0.1, "guided": True},
    ],
)
def test_every_loss_is_not_zero_and_falls(losses: dict[str, Any], setting: Setting) -> None:
    model = setting.generator(guided=losses.get("guided", False))
    objective, batch = setting.objective(**losses), setting.batch(*range(len(setting.data)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    totals = []
    for step in range(1, 31):
        optimizer.zero_grad()
        terms = objective(model, batch, step)
        (terms.total / terms.count).backward()
        optimizer.step()
        totals.append(terms.total.item() / terms.count)
    assert totals[0] > 0.05
    assert totals[-1] < 0.8 * totals[0]
    assert all(parameter.grad is None for parameter in setting.behaviour.model.parameters())


def test_the_norm_is_trained_beside_the_cosine(setting: Setting) -> None:
    batch = setting.batch(0)
    small = Fixed(setting.generator(), batch.adapters[0].map(lambda tensor: 0.3 * tensor))
    cosine = {"weight": 0, "delta": 1, "delta_kind": "cosine"}
    without, with_norm = (setting.objective(**cosine, norm=norm).validation(small, batch) for norm in (0.0, 1.0))
    assert with_norm.terms["norm"] > 1
    torch.testing.assert_close(with_norm.total - without.total, with_norm.terms["norm"])


def test_deltas_are_computed_with_the_probes_of_the_cache(setting: Setting, tiny_study: TinyStudy) -> None:
    """A student that is the teacher has its cached delta activation: same probes, formatting and length."""
    cache = DeltaCache.load(tiny_study.deltas)
    own = setting.behaviour.delta(setting.batch(*range(len(setting.data))).adapters)
    torch.testing.assert_close(own, cache.of([row.digest for row in setting.data.rows]), atol=1e-5, rtol=1e-5)


def test_drawn_prompts_depend_on_seed_step_and_adapter_but_not_on_the_micro_batch(setting: Setting) -> None:
    model, losses = setting.generator(), {"weight": 1.0, "delta": 0.0}
    together = setting.objective(**losses)(model, setting.batch(0, 1), 5).total
    alone = [setting.objective(**losses)(model, setting.batch(place), 5).total for place in (0, 1)]
    torch.testing.assert_close(together, sum(alone))
    assert setting.objective(**losses)(model, setting.batch(0, 1), 6).total != together
    assert setting.objective(seed=1, **losses)(model, setting.batch(0, 1), 5).total != together


def test_micro_batches_keep_to_the_token_budget(setting: Setting) -> None:
    data = setting.data
    sizes = [len(batch.indices) for batch in data.micro_batches(range(5), 2 * data.tokens)]
    assert sizes == [2, 2, 1]
    assert [len(batch.indices) for batch in data.micro_batches(range(2), 1)] == [1, 1]
