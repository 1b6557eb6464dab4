"""Two tiny families: a Llama with a chat template, and a Gemma 3 with BOS, sliding windows and scaled embeddings.

And a tiny sentence encoder, which knows neither.
"""

from __future__ import annotations

from pathlib import Path

import torch
from support.tiny_models import make_tiny_llama, make_tiny_tokenizer, spread_logits
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from stillhouse.runtime.files import write_manifest
from stillhouse.studies.latentwire.data import AnswerTokens, answer_tokens
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import ReaderSettings

FAMILIES = ("llama", "gemma")
TEXTS = ("Ada has 3 apples.\n", "Ben has 12 books and buys 5 more. How many books does Ben have?\n")
ANSWERS = ("3 apples", "17")


def make_tiny_gemma(directory: Path, vocab_size: int = 320) -> Path:
    """A random Gemma 3 with one sliding-window layer of 16 tokens and one full layer, no chat template, a BOS token."""
    directory.mkdir(parents=True, exist_ok=True)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Gemma3ForCausalLM(config)
    spread_logits(model)
    model.save_pretrained(directory)
    made = make_tiny_tokenizer(vocab_size)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    write_manifest(directory)
    return directory


def make_families(folder: Path) -> dict[str, Path]:
    """Model directories by family."""
    return {"llama": make_tiny_llama(folder / "llama"), "gemma": make_tiny_gemma(folder / "gemma")}


def tiny_reader(paths: dict[str, Path], family: str, **settings: object) -> Reader:
    """A reader of a family in fp32."""
    chosen = ReaderSettings.model_validate({"precision": "fp32", **settings})
    return Reader.load(family, paths[family], chosen)


def answers_of(reader: Reader, answers: tuple[str, ...] = ANSWERS) -> AnswerTokens:
    """A padded batch of answers."""
    return answer_tokens([reader.answer_ids(answer) for answer in answers])
