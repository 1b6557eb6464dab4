"""Resumable states, and the weights that a run is for. Safetensors and JSON, nothing pickled.

In `work_dir`: `state-<step>/` (trained parameters, optimiser moments, progress) and `checkpoint-<step>/`
(weights for evaluation), each moved into place whole, with a manifest. A state that is damaged, or whose
earlier checkpoints are, is skipped for the one before. Random states are not stored: the loop derives them
from (seed, step, process).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.lora import ADAPTER_CONFIG, sort_target_modules
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, staged_directory, verify_manifest, write_json, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.training.processes import process_state
from stillhouse.training.sharding import gathered, spread_like

STATE_TENSORS, STATE_PROGRESS = "state.safetensors", "progress.json"
PARAMETER = "parameter/"


@dataclass(frozen=True)
class Progress:
    """How far a run has come, over all of its attempts."""

    step: int = 0
    seconds: float = 0.0
    units: int = 0
    tokens: int = 0
    peak_memory_mib: float = 0.0
    micro_batch_tokens: int = 0


def save_state(
    work_dir: Path,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Write `state-<step>/` whole and durable, then prune all but the newest `keep` states.

    Every process calls this, the main one writes.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    tensors = {f"{PARAMETER}{name}": parameter.detach() for name, parameter in parameters.items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer/{names[parameter]}/{key}": value for key, value in moments.items()}
    tensors = gathered(tensors)
    if not process_state().is_main_process:
        return
    with staged_directory(work_dir / f"state-{progress.step}") as staging, _full_disk_as_os_error():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / STATE_TENSORS)
        write_json(staging / STATE_PROGRESS, asdict(progress))
        write_manifest(staging)
        _flush_to_disk(staging)
    for _, stale in numbered_directories(work_dir, "state")[keep:]:
        shutil.rmtree(stale)


def load_state(directory: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Restore parameters and optimiser from a verified state; a `UserError` where it is of another model.

    `parameters` are as the run began: those that do not require a gradient may be missing, and get memory of their own
    where they are not.
    """
    tensors = load_file(directory / STATE_TENSORS)
    saved = {name.removeprefix(PARAMETER): tensors[name] for name in tensors if name.startswith(PARAMETER)}
    expected = {name: own for name, own in parameters.items() if own.requires_grad or name in saved}
    if _shapes(saved) != _shapes(expected):
        raise UserError(f"{directory}: is of a model that trains other parameters: delete it and run again")
    with torch.no_grad():
        for name, parameter in expected.items():
            if parameter.requires_grad:
                parameter.copy_(spread_like(saved[name], parameter))
            else:
                parameter.data = saved[name].to(parameter.device, copy=True)
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name.rpartition("/")[2]: spread_like(tensor, parameter)
            for name, tensor in tensors.items()
            if name.rpartition("/")[0] == f"optimizer/{names[parameter]}"
        }
        for index, parameter in enumerate(ordered)
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(**read_json(directory / STATE_PROGRESS))


def latest_valid_state(work_dir: Path, saved_steps: Sequence[int]) -> Path | None:
    """The newest state that is whole, with every checkpoint up to it; None where training starts afresh.

    Each one that is skipped is logged with the file at fault.
    """
    for step, directory in numbered_directories(work_dir, "state"):
        try:
            verify_manifest(directory)
            for saved in saved_steps:
                if saved <= step:
                    verify_manifest(work_dir / f"checkpoint-{saved}")
        except UserError as error:
            logger.warning("cannot continue from step %d, trying an earlier state: %s", step, error)
            continue
        return directory
    return None


def save_weights(
    work_dir: Path,
    step: int,
    model: nn.Module,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Write `checkpoint-<step>/`: an adapter, a transformers model in `dtype`, or what a module has learnt.

    The last is the module's `trained_tensors` and those of the run's `parameters` that are frozen at this step. Every
    process calls this, the main one writes.
    """
    weights = gathered(model.state_dict()) if isinstance(model, PreTrainedModel) else {}
    if not process_state().is_main_process:
        return
    with staged_directory(work_dir / f"checkpoint-{step}") as staging, _full_disk_as_os_error():
        if isinstance(model, PeftModel):
            # "auto" would ask the hub whether the vocabulary was resized; Stillhouse never resizes it.
            model.save_pretrained(str(staging), safe_serialization=True, save_embedding_layers=False)
            (staging / "README.md").unlink(missing_ok=True)
            sort_target_modules(staging / ADAPTER_CONFIG)
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(staging, state_dict=_cast(weights, dtype))
            configuration = read_json(staging / "config.json")
            write_json(staging / "config.json", configuration | {"dtype": str(dtype).removeprefix("torch.")})
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        else:
            learnt = trained_tensors(model) | dict(parameters or {})
            plain = {name: tensor.detach().contiguous() for name, tensor in learnt.items()}
            save_file(plain, staging / "model.safetensors")
        write_manifest(staging)
        _flush_to_disk(staging)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the checkpoint of a plain module holds: parameters that require a gradient, and persistent buffers.

    Frozen models inside the module are not part of it, and neither is what they compute anew when they are made.
    """
    trained: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    persistent = model.state_dict().keys()
    return trained | {name: value for name, value in model.named_buffers() if name in persistent}


def export(work_dir: Path, output_dir: Path, saved_steps: Sequence[int]) -> None:
    """Put the run's checkpoints and logs into `output_dir`; files are linked where the disk allows it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for step in saved_steps:
        name = f"checkpoint-{step}"
        verify_manifest(work_dir / name)
        shutil.copytree(work_dir / name, output_dir / name, copy_function=_link_or_copy, dirs_exist_ok=True)


def numbered_directories(work_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """The directories `<kind>-<step>` of `work_dir` with their steps, newest first."""
    matches = ((re.fullmatch(rf"{kind}-(\d+)", path.name), path) for path in work_dir.glob(f"{kind}-*"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


@contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """Safetensors hides the operating system's error in a text of its own; `staged_directory` explains an OSError."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in `dtype`; tied ones stay one tensor, so that they are written once."""
    cast = {tensor.data_ptr(): tensor.to(dtype) for tensor in tensors.values() if tensor.is_floating_point()}
    return {name: cast.get(tensor.data_ptr(), tensor) for name, tensor in tensors.items()}


def _flush_to_disk(directory: Path) -> None:
    for path in _files_and_folders(directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files_and_folders(directory: Path) -> Iterator[Path]:
    yield from directory.rglob("*")
    yield directory


def _link_or_copy(source: str, target: str) -> str:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
        return target
    except OSError:
        return shutil.copy2(source, target)
