"""LoRA generation: batches of adapters in one forward pass, and one after another.

Delta activations of saved adapters on generic probes, as their cache computes them, beside the published recipe: each
adapter through peft, one probe at a time, the logits of every position. The same with the gradients of a loss on them,
as a generator is trained; and the trainings of small teacher adapters over one base, through the shared loop. No tool
batches adapters.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, model_directory, random_ids
from stillhouse.config.training import LoraSettings, ScheduleSettings, TrainingSettings
from stillhouse.data.packing import Sequence
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora_tensors import AdapterTensors, model_layout, read_adapter, stacked, write_adapter
from stillhouse.runtime.files import staged_directory
from stillhouse.studies.lora_generation.deltas import Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.probes import ProbeSettings
from stillhouse.training.adapter_batch import AdapterBatch, AdapterLosses, AdapterSequences
from stillhouse.training.loop import train

TARGETS = ("q_proj", "v_proj")
STEPS, BATCH, TEACHERS = 3, 2, 4


def random_adapters(model: PreTrainedModel, scale: Scale) -> AdapterTensors:
    """A batch of adapters about as large as trained ones."""
    layout = model_layout(model, TARGETS, scale.rank, 2 * scale.rank)
    drawing = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (0.02 * torch.randn(scale.adapters, *shape, generator=drawing)).to(model.device).requires_grad_()

    a = {module.name: values(scale.rank, module.inputs) for module in layout.modules}
    return AdapterTensors(a, {module.name: values(module.outputs, scale.rank) for module in layout.modules}, layout)


def probing(folder: Path, scale: Scale) -> tuple[PreTrainedModel, Probes, AdapterTensors]:
    """The frozen base in fp32, which deltas need, the five generic probes, and the adapters."""
    model = frozen(load_model(model_directory(folder, scale), "fp32"))
    probes = Probes.tokenise(ProbeSettings(kind="generic"), load_tokenizer(model_directory(folder, scale)), model)
    return model, probes, random_adapters(model, scale)


def saved_adapters(folder: Path, scale: Scale) -> list[Path]:
    """The random adapters as a collection has them, a peft folder each."""
    base = model_directory(folder, scale)
    directory = folder / f"adapters-{base.name}-{scale.rank}-{scale.adapters}"
    if not directory.exists():
        adapters = random_adapters(load_model(base, "fp32", "cpu"), scale).map(lambda tensor: tensor.detach())
        with staged_directory(directory) as staging:
            for number in range(scale.adapters):
                write_adapter(adapters[number], staging / f"adapter-{number:03d}", str(base))
    return sorted(directory.iterdir())


@torch.no_grad()
def published_deltas(folder: Path, scale: Scale) -> Work:
    """The published recipe: peft puts each adapter on the model, which reads one probe after another."""
    model, probes, _ = probing(folder, scale)
    found = saved_adapters(folder, scale)
    texts = [ids[mask.bool()][None] for ids, mask in zip(probes.ids, probes.mask, strict=True)]

    def activation(model: torch.nn.Module) -> Tensor:
        outputs = [model(input_ids=text, output_hidden_states=True) for text in texts]
        return torch.stack([output.hidden_states[-1][0, -1].float() for output in outputs]).mean(0)

    base = activation(model)

    @torch.no_grad()
    def work() -> Outcome:
        made = []
        for directory in found:
            adapted = PeftModel.from_pretrained(model, str(directory)).eval()
            made.append(activation(adapted) - base)
            adapted.unload()
        return {"deltas": torch.stack(made)}

    return work


def cached_deltas(at_once: int | None, folder: Path, scale: Scale) -> Work:
    """As the delta cache is filled: adapters from disk, so many in one forward pass, None: the default's number."""
    model, probes, _ = probing(folder, scale)
    found, base = saved_adapters(folder, scale), base_activation(model, probes)
    size = at_once or probes.settings.at_once

    @torch.no_grad()
    def work() -> Outcome:
        groups = [found[start : start + size] for start in range(0, len(found), size)]
        batches = (stacked([read_adapter(directory) for directory in group]).to(model.device) for group in groups)
        return {"deltas": torch.cat([delta_activation(model, batch, probes, base) for batch in batches])}

    return work


def deltas(together: bool, folder: Path, scale: Scale) -> Work:
    """Deltas of all adapters, and the gradients of their squared size, as a generator is trained."""
    model, probes, adapters = probing(folder, scale)
    base = base_activation(model, probes)

    def work() -> Outcome:
        found = (
            delta_activation(model, adapters, probes, base)
            if together
            else torch.stack([delta_activation(model, adapter, probes, base) for adapter in adapters])
        )
        tensors = {f"{side} of {name}": value for side in "ab" for name, value in getattr(adapters, side).items()}
        gradients = torch.autograd.grad(found.square().sum(), list(tensors.values()))
        return {"deltas": found.detach(), **dict(zip(tensors, gradients, strict=True))}

    return work


def deltas_one_by_one(folder: Path, scale: Scale) -> Work:
    """A forward pass for each adapter."""
    return deltas(False, folder, scale)


def deltas_together(folder: Path, scale: Scale) -> Work:
    """Ours."""
    return deltas(True, folder, scale)


def deltas_floor(passes: int, folder: Path, scale: Scale) -> Floor:
    """Every adapter's probes forward, and backward where there are two passes; the lm_head does not run."""
    _, probes, _ = probing(folder, scale)
    lengths = probes.mask.sum(1).tolist()
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    one = scale.operations(sum(lengths), pairs, 0)
    return Floor(passes * scale.adapters * one, passes * scale.weight_bytes, scale.adapters * sum(lengths))


def teachers(together: bool, folder: Path, scale: Scale) -> Work:
    """The adapters that the shared loop trains, each on examples of its own."""
    model = load_model(model_directory(folder, scale), "fp32")
    examples = [task(number, scale) for number in range(TEACHERS)]
    groups = [examples] if together else [[own] for own in examples]

    def work() -> Outcome:
        made = [adapter for group in groups for adapter in trained(model, group, scale)]
        return {
            f"{side} of {name}, adapter {number}": value
            for number, adapter in enumerate(made)
            for side in "ab"
            for name, value in getattr(adapter, side).items()
        }

    return work


def teachers_one_by_one(folder: Path, scale: Scale) -> Work:
    """A training for each adapter."""
    return teachers(False, folder, scale)


def teachers_together(folder: Path, scale: Scale) -> Work:
    """Ours."""
    return teachers(True, folder, scale)


def task(number: int, scale: Scale) -> list[Sequence]:
    """The examples of one adapter."""
    length = scale.prompt + scale.answer
    ids = [random_ids(length, scale, 100 * number + place) for place in range(STEPS * BATCH)]
    return [Sequence(row, scale.prompt, f"{number}-{place}") for place, row in enumerate(ids)]


def trained(model: PreTrainedModel, examples: list[list[Sequence]], scale: Scale) -> list[AdapterTensors]:
    """One adapter for each list of examples."""
    lora = LoraSettings(rank=scale.rank, alpha=2 * scale.rank, dropout=0.0, target_modules=TARGETS)
    settings = TrainingSettings(
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=1e-3,
        lora=lora,
        packing=False,
        precision=scale.precision,
        schedule=ScheduleSettings(warmup_steps=0),
        save_every=STEPS,
        resume_every=STEPS,
    )
    batch = AdapterBatch(model, lora, [0] * len(examples))
    with tempfile.TemporaryDirectory() as folder:
        train(
            batch,
            AdapterLosses([str(number) for number in range(len(examples))]),
            AdapterSequences(examples),
            settings,
            work_dir=Path(folder) / "work",
            output_dir=Path(folder) / "output",
            seed=0,
            groups=batch.groups(),
            clip_apart=True,
        )
    return [adapter.map(lambda tensor: tensor.detach().cpu()) for adapter in batch.adapters()]


def teachers_floor(folder: Path, scale: Scale) -> Floor:
    """Every adapter's examples forward and backward, answer rows through the lm_head."""
    length, examples = scale.prompt + scale.answer, TEACHERS * STEPS * BATCH
    one = scale.operations(length, length * (length + 1) / 2, scale.answer)
    return Floor(2 * examples * one, 2 * STEPS * scale.weight_bytes, examples * length)


PUBLISHED = "one probe at a time, through peft"
DELTAS = Benchmark(
    name="delta_activations",
    what="delta activations of A adapters",
    forms=(
        Form(PUBLISHED, "naive", published_deltas),
        Form("one by one", "other", partial(cached_deltas, 1)),
        Form("together", "ours", partial(cached_deltas, None)),
    ),
    aims=(
        Aim(
            PUBLISHED,
            "time",
            3,
            cause="Beside 'one by one', which has the probes of an adapter in one pass, the batch saves only the small "
            "calls around the products: one adapter's probes fill two cores already.",
        ),
    ),
    floor=partial(deltas_floor, 1),
    floor_formula="A x forward(probe tokens); the base's weights are read once",
    remains="Reading the adapters, padding of the probes, and each adapter's own small products.",
    tolerance=1e-3,
)
DELTA_GRADIENTS = Benchmark(
    name="delta_gradients",
    what="delta activations of A adapters with their gradients",
    forms=(Form("one by one", "naive", deltas_one_by_one), Form("together", "ours", deltas_together)),
    aims=(
        Aim(
            "one by one",
            "time",
            3,
            cause="Both forms do the same operations, and one adapter's probes fill two cores already: the batch saves "
            "only the small calls around the products. It is meant for a device that one adapter leaves idle.",
        ),
    ),
    floor=partial(deltas_floor, 2),
    floor_formula="2 x A x forward(probe tokens); the base's weights are read once in each direction",
    remains="Padding of the probes, and each adapter's own small products.",
    tolerance=1e-3,
)
TEACHER_BATCH = Benchmark(
    name="teacher_batch",
    what="small teacher LoRAs, batched",
    forms=(Form("one by one", "naive", teachers_one_by_one), Form("together", "ours", teachers_together)),
    aims=(Aim("one by one", "time", 2, device="gpu"),),
    floor=teachers_floor,
    floor_formula="2 x adapters x examples x forward(tokens, answer rows)",
    remains="What the loop writes around its few updates: states, curves, checkpoints.",
    tolerance=1e-3,
    change=lambda scale: replace(scale, rounds=min(5, scale.rounds)),
)
