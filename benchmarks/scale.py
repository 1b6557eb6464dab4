"""How large the benchmarks are on one kind of device, and the model and the problems that they share.

On a processor the model is Qwen3-1.7B made four times narrower and its texts four times shorter, with as many layers
and as large a vocabulary as keep the shares of projections, attention and output embeddings in a forward pass. Its
weights are random: they change no cost.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from stillhouse.config.training import LoraSettings, Precision
from stillhouse.models.loading import load_model
from stillhouse.models.lora import add_lora
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.files import staged_directory, write_manifest
from tests.support.tiny_models import make_tiny_tokenizer

WORDS = ("Ada", "Ben", "Chen", "Dora", "apples", "books", "coins", "has", "and", "buys", "many", "does", "have")
HEAD_SIZE = 64


@dataclass(frozen=True)
class Scale:
    """Sizes of every benchmark. prompt, answer, context: words, which are about as many tokens.

    rounds: how often each form takes its turn at most; seconds: after so long no round begins but the first few.
    examples: of a teacher cache. documents: of a corpus, extracted in batches of `batch_tokens`.
    questions: of an evaluation. generated: tokens of each answer, on a processor a quarter of the default's 112.
    """

    layers: int = 4
    width: int = 512
    vocabulary: int = 5504
    head_size: int = HEAD_SIZE
    prompt: int = 16
    answer: int = 24
    shots: int = 8
    batch: int = 8
    examples: int = 12
    top_k: int = 64
    rank: int = 4
    documents: int = 64
    batch_tokens: int = 512
    context: int = 100
    latents: int = 8
    text_length: int = 10
    adapters: int = 16
    checkpoints: int = 5
    questions: int = 16
    generated: int = 28
    precision: Precision = "fp32"
    rounds: int = 9
    seconds: float = 6.0

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's projections: queries and output, keys and values (half the heads), three of MLP."""
        return self.width**2 * (2 + 1 + 9)

    def operations(self, tokens: float, pairs: float, rows: float) -> float:
        """Of a forward pass: `tokens` through the layers, `pairs` of query and key, `rows` through the lm_head."""
        layers = self.layers * (2 * self.layer_weights * tokens + 4 * self.width * pairs)
        return layers + 2 * self.vocabulary * self.width * rows

    @property
    def weight_bytes(self) -> float:
        """The weights' size in memory."""
        size = 2 if self.precision == "bf16" else 4
        return size * (self.layers * self.layer_weights + self.vocabulary * self.width)


PROCESSOR = Scale()
GPU = Scale(
    layers=28,
    width=2048,
    vocabulary=151936,
    head_size=128,
    prompt=64,
    answer=96,
    documents=512,
    batch_tokens=8192,
    questions=128,
    generated=112,
    context=200,
    latents=32,
    examples=64,
    top_k=256,
    rank=16,
    precision="bf16",
    rounds=15,
    seconds=120.0,
)
# In no time: for tests, and for what libraries load when they are first used.
TINY = Scale(
    layers=2,
    width=64,
    vocabulary=512,
    head_size=16,
    prompt=6,
    answer=8,
    shots=2,
    batch=2,
    examples=4,
    top_k=16,
    documents=6,
    context=20,
    latents=3,
    text_length=4,
    adapters=2,
    checkpoints=1,
    questions=2,
    generated=4,
)


def model_directory(folder: Path, scale: Scale) -> Path:
    """The scale's random model with a tokenizer in the layout of a materialised asset; made when first asked for."""
    sizes = (scale.layers, scale.width, scale.vocabulary, scale.head_size)
    directory = folder / f"model-{short_digest(list(sizes))}"
    if not directory.exists():
        heads = scale.width // scale.head_size
        config = Qwen3Config(
            vocab_size=scale.vocabulary,
            hidden_size=scale.width,
            intermediate_size=3 * scale.width,
            num_hidden_layers=scale.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=scale.head_size,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            bos_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
        with staged_directory(directory) as staging, torch.random.fork_rng():
            torch.manual_seed(0)
            Qwen3ForCausalLM(config).save_pretrained(staging)
            make_tiny_tokenizer().save_pretrained(staging)
            write_manifest(staging)
    return directory


def problem_directory(folder: Path, scale: Scale, count: int) -> Path:
    """Made-up word problems as a training split, with answers of one to one and a half times `answer` words."""
    directory = folder / f"problems-{scale.prompt}-{scale.answer}-{count}"
    if not directory.exists():
        with staged_directory(directory) as staging:
            rows = [
                {
                    "id": f"problem-{number:04d}",
                    "question": words(scale.prompt, 2 * number),
                    "answer": f"{words(scale.answer + number % 3 * scale.answer // 4, 2 * number + 1)} #### {number}",
                }
                for number in range(count)
            ]
            (staging / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            write_manifest(staging)
    return directory


def words(count: int, seed: int) -> str:
    """So many words, by seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def random_ids(count: int, scale: Scale, seed: int) -> list[int]:
    """So many token ids, by seed, none of them special."""
    drawing = torch.Generator().manual_seed(seed)
    return torch.randint(10, scale.vocabulary, (count,), generator=drawing).tolist()


def student(directory: Path, scale: Scale) -> PeftModel:
    """The model with a LoRA away from its zero start and without dropout, in training mode."""
    return adapted(load_model(directory, scale.precision), scale.rank)


def adapted(base: PreTrainedModel, rank: int) -> PeftModel:
    """The base with such a LoRA on every projection."""
    model = add_lora(base, LoraSettings(rank=rank, alpha=2 * rank, dropout=0.0), seed=0)
    drawing = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=drawing)).to(parameter.data)
    return model.train()


def loss_and_gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and, after a backward pass, the gradient of every trained parameter by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}
    return {"loss": loss.detach(), **gradients}


def exact(scale: Scale) -> Scale:
    """The same in fp32, in which forms are compared."""
    return replace(scale, precision="fp32")
