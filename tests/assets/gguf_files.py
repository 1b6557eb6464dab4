"""Tiny GGUF files for the conversion's tests: a Llama with untied embeddings, and a tokenizer like Gemma's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

BOS, EOS, UNKNOWN = 1, 2, 0
WIDTH, HEADS, FEED_FORWARD = 32, 4, 64


def make_gguf(path: Path, seed: int = 0) -> Path:
    """Write a float32 GGUF of one layer; token 1 starts a turn and token 2 ends it, as in SmolLM2."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "34"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "3 4"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    generator = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, generator.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", WIDTH, WIDTH)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", WIDTH)
    add("blk.0.ffn_gate.weight", FEED_FORWARD, WIDTH)
    add("blk.0.ffn_up.weight", FEED_FORWARD, WIDTH)
    add("blk.0.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_gemma_tokenizer_gguf(path: Path) -> Path:
    """Write a GGUF of no weights and a scored sentencepiece BPE: `▁cap` from `ca`, `cap`, and a run of spaces."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    learnt = ["ca", "ap", "cap", "▁cap", "▁", "a", "c", "p"]
    writer = GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, "▁▁", *learnt])
    writer.add_token_scores([-1000.0] * 5 + [-float(rank) for rank in range(len(learnt))])
    writer.add_token_types([TokenType.CONTROL] * 4 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * len(learnt))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
