"""Settings of a 4-bit weight format: what it is called, where it fits, and why a machine cannot run it.

The workflow asks for objections while it builds the DAG, so this module imports no torch; `models.quantization` does
the arithmetic.
"""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel

FormatKind = Literal["int4", "nvfp4", "nf4", "fp4"]
# Where the LoRA of a student sits: inside the rounded weight, Q(W + BA)x, or beside it, Q(W)x + BAx.
LoraQuantisation = Literal["merged", "beside"]

# What rounds the weights, where this package does not do it itself, and what packs and unpacks them.
LIBRARIES: dict[FormatKind, tuple[str, ...]] = {
    "int4": ("compressed_tensors",),
    "nvfp4": ("torchao", "compressed_tensors"),
    "nf4": ("bitsandbytes",),
    "fp4": ("bitsandbytes",),
}
# nvfp4: a scale per 16 weights is part of the format; nf4 and fp4: bitsandbytes' own block in transformers.
FIXED_GROUPS: dict[FormatKind, int] = {"nvfp4": 16, "nf4": 64, "fp4": 64}
# The first GPUs that multiply NVFP4 numbers (Blackwell).
NVFP4_COMPUTE_CAPABILITY = 10.0


@dataclass(frozen=True)
class Machine:
    """What a machine has for a format: the compute capability of each GPU, and the libraries that can be imported."""

    compute_capabilities: tuple[float, ...]
    libraries: frozenset[str]


class WeightFormat(StrictModel):
    """How the linear weights of a model's blocks are stored: four bits a weight, and a scale for each group."""

    kind: Annotated[
        FormatKind,
        Field(
            description="int4: whole numbers (torchao's grid); nvfp4: 4-bit floats with 8-bit scales (torchao's); "
            "nf4, fp4: bitsandbytes'."
        ),
    ] = "int4"
    group_size: Annotated[
        int | None,
        Field(
            ge=2,
            description="Neighbouring weights of a row that share a scale; null: the format's own (int4: 128, nvfp4: "
            "16, nf4 and fp4: 64). It must divide every row.",
        ),
    ] = None
    symmetric: Annotated[bool, Field(description="int4 without zero points; false spans each group's own range.")] = (
        True
    )
    emulated: Annotated[
        bool,
        Field(
            description="nvfp4 on a machine without NVFP4 arithmetic. Products are of the rounded weights, in the "
            "model's precision, on every machine: the name is `nvfp4-emulated` either way."
        ),
    ] = False

    @property
    def group(self) -> int:
        """Weights per scale."""
        return self.group_size or FIXED_GROUPS.get(self.kind, 128)

    @property
    def name(self) -> str:
        """A name for paths and tables: `int4-g64`, `int4-g32-asymmetric`, `nvfp4-emulated`, `nf4`."""
        if self.kind == "int4":
            return f"int4-g{self.group}" + ("" if self.symmetric else "-asymmetric")
        return "nvfp4-emulated" if self.kind == "nvfp4" else self.kind

    def objection(self, machine: Machine) -> str | None:
        """Why this machine cannot run the format, and what to do; None where it can."""
        missing = [library for library in LIBRARIES[self.kind] if library not in machine.libraries]
        if missing:
            return f"format {self.name} needs {missing[0]}, which is not installed: install it, or choose another kind"
        capable = any(capability >= NVFP4_COMPUTE_CAPABILITY for capability in machine.compute_capabilities)
        if self.kind == "nvfp4" and not self.emulated and not capable:
            found = ", ".join(map(str, machine.compute_capabilities)) or "no GPU"
            return (
                f"format nvfp4 needs a GPU of compute capability {NVFP4_COMPUTE_CAPABILITY} (found: {found}): set "
                "emulated to true to compute with the rounded weights, or choose another kind"
            )
        return None

    @model_validator(mode="after")
    def settings_fit_the_kind(self) -> WeightFormat:
        """Refuse settings that the kind does not have."""
        fixed = FIXED_GROUPS.get(self.kind)
        if fixed is not None and self.group_size not in (None, fixed):
            raise ValueError(f"group_size ({self.group_size}) of {self.kind} is always {fixed}: leave it unset")
        if self.kind != "int4" and not self.symmetric:
            raise ValueError(f"symmetric false is for kind int4: {self.kind} has no zero points")
        if self.kind != "nvfp4" and self.emulated:
            raise ValueError(f"emulated is for kind nvfp4: {self.kind} needs no emulation")
        return self


@cache
def this_machine() -> Machine:
    """What the machine that builds the DAG has."""
    names = {name for libraries in LIBRARIES.values() for name in libraries}
    return Machine(_compute_capabilities(), frozenset(filter(importlib.util.find_spec, names)))


def _compute_capabilities() -> tuple[float, ...]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(float(line) for line in listed.split() if line.replace(".", "", 1).isdigit())
