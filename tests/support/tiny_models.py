"""A tiny random Llama with a real tokenizer, made in under a second, for tests that need a model directory.

The tokenizer is byte-level BPE, trained here on a few made-up word problems, with a ChatML template; the
directory has the layout of a materialised asset (transformers files and a manifest).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from stillhouse.runtime.files import write_manifest

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def word_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Made-up problems with GSM8K's fields and answer format: `question`, and `answer` ending in `#### N`."""
    generator = random.Random(seed)
    problems = []
    for index in range(count):
        name = generator.choice(["Ada", "Ben", "Chen", "Dora"])
        thing = generator.choice(["apples", "books", "coins"])
        first, second = generator.randint(1, 20), generator.randint(1, 20)
        total = first + second
        problems.append(
            {
                "id": f"problem-{index:04d}",
                "question": f"{name} has {first} {thing} and buys {second} more. How many {thing} does {name} have?",
                "answer": f"{name} has {first} + {second} = <<{first}+{second}={total}>>{total} {thing}.\n#### {total}",
            }
        )
    return problems


def make_tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries; pads with `<|endoftext|>`, ends a turn with `<|im_end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = word_problems(256)
    texts = [f"Question: {problem['question']}\nAnswer: {problem['answer']}" for problem in problems]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def tiny_llama_config(vocab_size: int = 384) -> LlamaConfig:
    """Two layers of width 32 with grouped-query attention; no dropout."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def spread_logits(model: PreTrainedModel) -> None:
    """Enlarge the matrices beyond the default initialisation: logits differ enough for greedy decoding to be clear."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)


def make_tiny_llama(directory: Path, vocab_size: int = 384, seed: int = 0, chat_template: bool = True) -> Path:
    """Write the tiny model, its tokenizer and a manifest to `directory`, which is made and returned."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(vocab_size))
    spread_logits(model)
    model.save_pretrained(directory)
    tokenizer = make_tiny_tokenizer(vocab_size)
    if not chat_template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    write_manifest(directory)
    return directory


def make_tiny_sentence_encoder(directory: Path, positions: int = 64, seed: int = 0) -> Path:
    """A random BERT of one layer with 16 dimensions that takes so many tokens, as a materialised model directory."""
    config = BertConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    write_manifest(directory)
    return directory
