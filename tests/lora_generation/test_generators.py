"""Generators can represent the teachers, begin near their start, and come back from a checkpoint as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stillhouse.models.lora_tensors import (
    AdapterTensors,
    LoraLayout,
    ModuleShape,
    mean_adapter,
    relative_error,
    stacked,
)
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.config import EMBEDDED
from stillhouse.studies.lora_generation.generator_settings import GeneratorSettings, TokenSettings
from stillhouse.studies.lora_generation.generators import Generator, GeneratorPlan, load_generator, write_plan
from stillhouse.training.checkpoints import trained_tensors
from tests.lora_generation.adapters import random_adapter, small_layout

WIDTH, PROMPTS = 12, 3
KINDS: dict[str, dict[str, Any]] = {
    "compact": {"kind": "compact", "width": 32, "layers": 1},
    "hyper_convolution": {
        "kind": "hyper_convolution",
        "kernel": 3,
        "stages": [{"tokens": 16, "rows": 6, "columns": 16}],
    },
}


def plan(kind: str, layout: LoraLayout, guide: int | None = None, vectors: int = 2, **settings: Any) -> GeneratorPlan:
    return GeneratorPlan(
        generator=GeneratorSettings.model_validate({"prompts": PROMPTS, "start": "zero"} | KINDS[kind] | settings),
        tokens=TokenSettings(rows=3, columns=8),
        layout=layout,
        base_model="tiny",
        text_key="key",
        vectors=vectors,
        width=WIDTH,
        guide=guide,
    )


def conditions(batch: int, vectors: int = 2) -> torch.Tensor:
    return torch.randn(batch, PROMPTS, vectors, WIDTH, generator=torch.Generator().manual_seed(7))


def made(wanted: GeneratorPlan, adapters: list[AdapterTensors], seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    generator = Generator(wanted)
    generator.fit(adapters, torch.ones(len(adapters), 4), conditions(2, wanted.vectors))
    return generator


def error_after(updates: int, wanted: GeneratorPlan, adapters: list[AdapterTensors]) -> float:
    """The largest relative error of the products, of a generator that learns these adapters by heart."""
    read, teachers = conditions(len(adapters), wanted.vectors), stacked(adapters)
    generator = made(wanted, adapters)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    encoded = generator.tokeniser.encode(teachers)
    for _ in range(updates):
        optimizer.zero_grad()
        difference = generator.tokeniser.encode(generator(read).adapter) - encoded
        difference[~encoded.isnan()].square().mean().backward()
        optimizer.step()
        schedule.step()
    return float(relative_error(generator(read).adapter, teachers).detach().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_gives_each_of_two_sets_of_prompts_its_own_adapter(kind: str) -> None:
    layout = small_layout()
    adapters = [random_adapter(layout, seed, size=0.05) for seed in (1, 2)]
    assert error_after(400, plan(kind, layout), adapters) < 0.03
    assert relative_error(adapters[0], adapters[1]) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_can_learn_one_adapter_of_thirty_layers(kind: str) -> None:
    """As many layers as the default's base has, whose matrices share heads or kernels, and the default's width."""
    layout, default = small_layout(layers=30), EMBEDDED["defaults"]["generator"]
    own = {"width": default["width"], "layers": default["layers"]} if kind == "compact" else {}
    assert error_after(200, plan(kind, layout, **own), [random_adapter(layout, 1, size=0.05)]) < 1e-3


def test_a_repeated_pattern_of_64_columns_cannot() -> None:
    """What the published generator gives: the best such pattern is the mean of a matrix's tiles."""
    name = "model.layers.0.q_proj"
    teacher = random_adapter(LoraLayout((ModuleShape(name, 576, 576),), 4, 8), 1)

    def tiled(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.unflatten(-1, (-1, 64)).mean(-2).repeat(1, 576 // 64)

    best = AdapterTensors({name: tiled(teacher.a[name])}, {name: tiled(teacher.b[name].mT).mT}, teacher.layout)
    assert relative_error(best, teacher) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_begins_near_the_mean_of_the_training_adapters(kind: str) -> None:
    layout = small_layout()
    adapters = [random_adapter(layout, seed, size=0.05) for seed in (1, 2, 3)]
    given = made(plan(kind, layout, start="mean"), adapters)(conditions(1)).adapter[0]
    assert 0 < relative_error(given, mean_adapter(adapters)) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_batch_are_generated_as_if_alone(kind: str) -> None:
    layout = small_layout()
    generator = made(plan(kind, layout, guide=4), [random_adapter(layout, 1)]).eval()
    read = conditions(3)
    together = generator(read)
    assert together.adapter.count == 3
    for place in range(3):
        alone = generator(read[place : place + 1])
        assert relative_error(together.adapter[place], alone.adapter[0]) < 1e-5
        torch.testing.assert_close(together.delta[place], alone.delta[0])


def test_a_guided_generator_decodes_from_its_prediction() -> None:
    layout = small_layout()
    generator = made(plan("compact", layout, guide=4), [random_adapter(layout, 1)])
    read = conditions(1)
    before = generator(read)
    with torch.no_grad():
        generator.guide.predict[-1].bias += 1.0
    after = generator(read)
    torch.testing.assert_close(after.delta - before.delta, torch.ones(1, 4))
    assert relative_error(after.adapter, before.adapter) > 0.01


def test_the_order_of_prompts_is_nothing_to_the_compact_decoder() -> None:
    layout = small_layout()
    generator = made(plan("compact", layout), [random_adapter(layout, 1)])
    read = conditions(1)
    assert relative_error(generator(read.flip(1)).adapter, generator(read).adapter) < 1e-5


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Generator, Path]:
    layout = small_layout()
    wanted = plan("compact", layout, guide=4, start="mean")
    generator = made(wanted, [random_adapter(layout, 1), random_adapter(layout, 2)])
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_file({n: t.detach().contiguous() for n, t in trained_tensors(generator).items()}, folder / "model.safetensors")
    write_plan(tmp_path, wanted)
    return generator, folder


def test_a_checkpoint_gives_the_same_adapters(checkpoint: tuple[Generator, Path]) -> None:
    generator, folder = checkpoint
    loaded = load_generator(folder)
    assert loaded.plan == generator.plan
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    read = conditions(1)
    assert relative_error(loaded(read).adapter, generator(read).adapter) < 1e-6


def test_a_damaged_checkpoint_is_named(checkpoint: tuple[Generator, Path]) -> None:
    generator, folder = checkpoint
    changed = generator.plan.model_copy(update={"width": WIDTH + 1})
    write_plan(folder.parent, changed)
    with pytest.raises(UserError, match=r"model.safetensors: does not fit .*generator.json"):
        load_generator(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model.safetensors: is corrupt"):
        load_generator(folder)
