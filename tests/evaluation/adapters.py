"""Random LoRA adapters for a tiny model, strong enough to change its greedy answers."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(model_directory: Path, directory: Path, rank: int, seed: int) -> Path:
    """Write an adapter with random A and B matrices for the model in `model_directory`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    configuration = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, configuration)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(directory)
    return directory
