"""The faster LoRA products of vLLM's CPU fallback equal vLLM's own."""

from __future__ import annotations

import pytest
import torch

from stillhouse.evaluation.engines import vllm_cpu_lora as ours

vllm_source = pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

TOKENS, WIDTH, RANK = 7, 12, 4


@pytest.fixture(scope="module")
def theirs():
    """The functions of vLLM itself, loaded apart so that an installed replacement does not hide them."""
    import importlib.util

    from vllm.lora.ops.torch_ops import lora_ops

    spec = importlib.util.spec_from_file_location("vllm_original_lora_ops", lora_ops.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("indices", [[0] * TOKENS, [1] * TOKENS, [0, 1, 1, 2, 0, 2, 1]])
@pytest.mark.parametrize("four_dimensional", [False, True])
@pytest.mark.parametrize("add_inputs", [False, True])
def test_each_product_equals_vllms(theirs, indices: list[int], four_dimensional: bool, add_inputs: bool) -> None:
    torch.manual_seed(0)
    inputs, index = torch.randn(TOKENS, WIDTH), torch.tensor(indices)
    shape = (3, 1, RANK, WIDTH) if four_dimensional else (3, RANK, WIDTH)
    weights, output = torch.randn(shape), torch.randn(TOKENS, 9)
    for name, arguments in {
        "bgmv_shrink": (0.5,),
        "bgmv_expand": (add_inputs,),
        "bgmv_expand_slice": (3, RANK, add_inputs),
    }.items():
        expected, found = output.clone(), output.clone()
        getattr(theirs, name)(inputs, weights, expected, index, *arguments)
        getattr(ours, name)(inputs, weights, found, index, *arguments)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
