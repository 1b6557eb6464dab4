"""Two processes train a tiny Llama fully, spread by `sharding.shard` or by DeepSpeed: `torchrun -m ... KIND FOLDER`.

KIND is `fsdp`, `zero2` or `deepspeed`. Each process writes what it holds in bytes, the first one also the weights.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as distributed
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.training.sharding import gathered, shard

UPDATES, BATCH, CLIP = 6, 4, 1.0
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SIZE = {"vocab_size": 384, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def held(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of this process behind the tensors; what shares memory counts once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


def moments(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of Adam's two moments."""
    return held(state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean loss of this process's share of a batch."""
    mine = batch[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
    return model(input_ids=mine, labels=mine).loss


def train_sharded(kind: str, model: nn.Module, batches: Tensor) -> tuple[dict[str, int], dict[str, Tensor]]:
    """As the training loop spreads a model."""
    PartialState(cpu=True)
    shard(model, torch.device("cpu"), keep_weights_gathered=kind == "zero2")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for batch in batches:
        loss = loss_of(model, batch)
        between = held(model.parameters())
        loss.backward()
        gradients = held(parameter.grad for parameter in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    held_here = {"weights": held(model.parameters()), "between passes": between}
    held_here |= {"gradients": gradients, "moments": moments(optimizer)}
    return held_here, gathered(dict(model.named_parameters()))


def train_deepspeed(model: nn.Module, batches: Tensor) -> tuple[dict[str, int], dict[str, Tensor]]:
    """As DeepSpeed's ZeRO-2 does, with the same optimiser."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    settings = {
        "train_batch_size": BATCH,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 2**17, "allgather_bucket_size": 2**17},
        "zero_allow_untrusted_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), **ADAMW), config=settings
    )
    for batch in batches:
        engine.backward(loss_of(engine, batch))
        gradients = held(part for parts in optimizer.averaged_gradients.values() for part in parts or ())
        engine.step()
    weights = held(model.parameters())
    own = held(optimizer.single_partition_of_fp32_groups)
    held_here = {"weights": weights + own, "between passes": weights + own}
    held_here |= {"gradients": gradients, "moments": moments(optimizer.optimizer)}
    return held_here, {name: weight.detach() for name, weight in model.named_parameters()}


def main(kind: str, folder: Path) -> None:
    """Train, and write `<rank>.json` and `weights.safetensors`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS))
    whole = held(model.parameters())
    batches = torch.randint(0, SIZE["vocab_size"], (UPDATES, BATCH, 32), generator=torch.Generator().manual_seed(1))
    held_here, weights = train_deepspeed(model, batches) if kind == "deepspeed" else train_sharded(kind, model, batches)
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(held_here | {"whole": whole}))
    if rank == "0":
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "weights.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
