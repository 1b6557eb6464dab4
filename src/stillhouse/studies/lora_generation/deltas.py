"""Delta activations: what an adapter does to the model's last state on fixed probe texts (arXiv 2509.04442).

delta = mean over probes of (last layer's state at the last real token, with the adapter - without), fp32 [hidden].
As a step program it computes those of all teacher adapters of a model and leaves a directory with `manifest.json`
(model, probes, digest of each adapter), `base_activation.npy` and one .npy file per adapter. Teachers and students go
through the same functions with the probes that the directory records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.lora_tensors import AdapterTensors
from stillhouse.studies.lora_generation.probes import ProbeSettings


@dataclass(frozen=True)
class Probes:
    """The probe texts as the model reads them: ids and mask [probes, tokens], padded on the right."""

    settings: ProbeSettings
    ids: Tensor
    mask: Tensor


def tokenise_probes(settings: ProbeSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Probes:
    """Format and tokenise the probes. Raises `UserError` for one longer than `max_length` or the model's context."""
    raise NotImplementedError


def base_activation(model: PreTrainedModel, probes: Probes) -> Tensor:
    """Mean over probes of the base model's last state at the last real token, [hidden] fp32, no gradient."""
    raise NotImplementedError


def delta_activation(model: PreTrainedModel, adapter: AdapterTensors, probes: Probes, base: Tensor) -> Tensor:
    """Delta activations of a batch of adapters [A, hidden], or of one [hidden]; fp32, differentiable in the adapter."""
    raise NotImplementedError


@dataclass(frozen=True)
class DeltaCache:
    """What the step program leaves: the probes, the base activation [hidden], and each adapter's delta [hidden]."""

    probes: ProbeSettings
    base: Tensor
    deltas: dict[str, Tensor]  # by adapter name, such as boolq/shard_0-seed_42/step_500

    @classmethod
    def load(cls, directory: Path) -> DeltaCache:
        """Read and verify a directory; a damaged one is a `UserError` naming the file."""
        raise NotImplementedError
