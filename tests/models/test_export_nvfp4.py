"""Plain transformers computes with an exported nvfp4 model in bf16, which compressed-tensors unpacks its weights to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM

from stillhouse.config.quantization import WeightFormat
from stillhouse.models.export import export_quantized
from stillhouse.models.quantized_lora import load_student

IDS = torch.randint(1, 384, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The export of a rounded model, and what it says in fp32."""
    folder = tmp_path_factory.mktemp("nvfp4")
    model = load_student(
        make_tiny_llama(folder / "base"), None, WeightFormat(kind="nvfp4", emulated=True), precision="fp32"
    )
    export_quantized(model, None, folder / "exported")
    with torch.no_grad():
        return folder / "exported", model.eval()(input_ids=IDS).logits


@torch.no_grad()
def test_in_bf16_its_logits_are_those_of_the_rounded_model(exported: tuple[Path, torch.Tensor]) -> None:
    directory, expected = exported
    logits = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)(input_ids=IDS).logits.float()
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_in_fp32_it_is_refused_by_the_dtype_of_its_weights(exported: tuple[Path, torch.Tensor]) -> None:
    # Should this pass one day, nvfp4 belongs among the formats that test_export.py loads in fp32.
    model = AutoModelForCausalLM.from_pretrained(exported[0], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(input_ids=IDS)
