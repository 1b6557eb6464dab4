"""The whole configuration: the catalogue and what the studies share, and one section per study.

It stands above the studies because it holds their sections. The Snakefile builds it while the DAG is made, so it
imports no torch; every fault is a `ConfigurationError` before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from stillhouse.config.assets import DatasetEntry, ModelEntry
from stillhouse.config.base import SettingError, StrictModel, check_path_names
from stillhouse.config.catalogue import DATASETS, MODELS
from stillhouse.config.layering import Layer, nearest, read_layer, validate
from stillhouse.config.resources import ResourceSettings
from stillhouse.config.training import TrackingSettings
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.consistency_lens.config import EMBEDDED as CONSISTENCY_LENS
from stillhouse.studies.consistency_lens.config import ConsistencyLensConfig
from stillhouse.studies.context_distillation.config import EMBEDDED as CONTEXT_DISTILLATION
from stillhouse.studies.context_distillation.config import ContextDistillationConfig
from stillhouse.studies.latentwire.config import EMBEDDED as LATENTWIRE
from stillhouse.studies.latentwire.config import LatentWireConfig
from stillhouse.studies.lora_generation.config import EMBEDDED as LORA_GENERATION
from stillhouse.studies.lora_generation.config import LoraGenerationConfig
from stillhouse.studies.quantized_distillation.config import EMBEDDED as QUANTIZED_DISTILLATION
from stillhouse.studies.quantized_distillation.config import QuantizedDistillationConfig

STUDIES = ("context_distillation", "quantized_distillation", "consistency_lens", "latentwire", "lora_generation")


class Configuration(StrictModel):
    """Everything a user can set, in one file."""

    studies: Annotated[tuple[str, ...], Field(description="Studies that `all` and results.md contain.")] = STUDIES
    models: Annotated[dict[str, ModelEntry], Field(description="The catalogue's models.")] = MODELS
    datasets: Annotated[dict[str, DatasetEntry], Field(description="The catalogue's data sets.")] = DATASETS
    tracking: TrackingSettings = TrackingSettings()
    resources: ResourceSettings = ResourceSettings()
    context_distillation: ContextDistillationConfig = ContextDistillationConfig()
    quantized_distillation: QuantizedDistillationConfig = QuantizedDistillationConfig()
    consistency_lens: ConsistencyLensConfig = ConsistencyLensConfig()
    latentwire: LatentWireConfig = LatentWireConfig()
    lora_generation: LoraGenerationConfig = LoraGenerationConfig()

    @model_validator(mode="after")
    def names_are_in_the_catalogue(self) -> Configuration:
        """Refuse a study, model or data set that is declared nowhere, and names that no folder may have."""
        check_path_names("models", self.models)
        check_path_names("datasets", self.datasets)
        for study in self.studies:
            if study not in STUDIES:
                raise SettingError(("studies",), f"unknown study '{study}': {nearest(study, STUDIES, 'studies')}")
        for study in STUDIES:
            for reference in getattr(self, study).references():
                entries = self.models if reference.kind == "model" else self.datasets
                if reference.name not in entries:
                    raise SettingError(
                        (study, *reference.location),
                        f"unknown {reference.kind} '{reference.name}': "
                        f"{nearest(reference.name, list(entries), f'{reference.kind}s')}",
                    )
        return self

    @model_validator(mode="after")
    def engines_get_the_gpus_they_spread_over(self) -> Configuration:
        """Refuse an evaluation that spreads a model over another number of GPUs than its job asks for."""
        for study in self.studies:
            engine = getattr(getattr(self, study), "engine", None)
            if engine is not None and engine.tensor_parallel != self.resources.evaluation.gpus:
                raise SettingError(
                    (study, "evaluation", "engine", "tensor_parallel"),
                    f"is {engine.tensor_parallel}, but resources.evaluation.gpus is {self.resources.evaluation.gpus}: "
                    "give both the same number",
                )
        return self

    @model_validator(mode="after")
    def engines_can_divide_the_heads(self) -> Configuration:
        """Refuse GPUs among which vLLM cannot divide a model's heads, as far as its `config.json` is on this machine.

        Of a model that is yet to be fetched the evaluation says so itself, before its engine starts.
        """
        for study in self.studies:
            engine = getattr(getattr(self, study), "engine", None)
            if engine is None or engine.tensor_parallel == 1:
                continue
            for name in getattr(self, study).models:
                config = self.models[name].architecture(name) if self.models[name].vllm else None
                if config and (problem := engine.spreading_objection(name, config)):
                    raise SettingError((study, "evaluation", "engine", "tensor_parallel"), problem)
        return self


def embedded_configuration() -> Configuration:
    """The configuration of `config/config.yaml`: every study at a size for two cores, from packages alone."""
    return Configuration.model_validate(
        {
            "context_distillation": CONTEXT_DISTILLATION,
            "quantized_distillation": QUANTIZED_DISTILLATION,
            "consistency_lens": CONSISTENCY_LENS,
            "latentwire": LATENTWIRE,
            "lora_generation": LORA_GENERATION,
        }
    )


def load_configuration(
    merged: Mapping[str, Any], files: Sequence[Path], command_line: Mapping[str, Any]
) -> Configuration:
    """Validate what the workflow engine merged from `files` and `--config`; messages name the layer at fault.

    Raises `ConfigurationError`.
    """
    layers = [*(read_layer(path) for path in files), Layer("--config", command_line)]
    known = set(Configuration.model_fields)
    for key in merged:
        if key not in known:
            layer = next(layer for layer in reversed(layers) if key in layer.values)
            raise ConfigurationError(f"{layer.name}: '{key}': unknown key: {nearest(key, sorted(known), 'keys')}")
    return validate(Configuration, merged, layers)
