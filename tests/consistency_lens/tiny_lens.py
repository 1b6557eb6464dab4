"""A lens of the tiny model, trained for a few steps by the real step program, and the step that evaluates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.config.training import TrackingSettings
from stillhouse.studies.consistency_lens import train
from stillhouse.studies.consistency_lens.config import EvaluationSettings
from stillhouse.studies.consistency_lens.evaluate import EvaluateStep
from stillhouse.studies.consistency_lens.run_settings import RunSettings
from stillhouse.studies.consistency_lens.train import TrainStep
from tests.consistency_lens.conftest import Artefacts
from tests.consistency_lens.corpus import activation_settings


def run_settings(**changes: Any) -> RunSettings:
    """Layer 1, explanations of four tokens, a few steps; `changes` lie over them."""
    extraction = activation_settings()
    settings: dict[str, Any] = {
        "positions": extraction.positions.model_dump(),
        "max_length": extraction.max_length,
        "lens": {"layer": 1, "text_length": 4, "encoder": {"output_layer": 1}},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "micro_batch_tokens": 400,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "save_every": 2,
            "resume_every": 4,
        },
    }
    return RunSettings.model_validate(settings | changes)


def training_step(artefacts: Artefacts, activations: Path, folder: Path, seed: int = 1, **changes: Any) -> TrainStep:
    """The step that trains a lens, in `folder/lenses/lens/seed_<seed>`."""
    return TrainStep(
        model=artefacts.model,
        activations=activations,
        output=folder / "lenses" / "lens" / f"seed_{seed}",
        work=folder / "work",
        condition="lens",
        seed=seed,
        run=run_settings(**changes),
        tracking=TrackingSettings(),
        trust_remote_code=False,
    )


def train_lens(artefacts: Artefacts, activations: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """Train a lens; returns where it lies."""
    step = training_step(artefacts, activations, folder, seed, **changes)
    train.main(step)
    return step.output


def evaluation_step(
    artefacts: Artefacts, activations: Path, lenses: tuple[Path, ...], folder: Path, **changes: Any
) -> EvaluateStep:
    """The step that scores all test documents in batches of three; `changes` lie over the evaluation's settings."""
    settings: dict[str, Any] = {
        "batch_size": 3,
        "best_of": [1, 3],
        "hard_coded_prompt": "Ada buys",
        "verbose_samples": 2,
        "top_n": 3,
        "continuation_tokens": 4,
    }
    other = changes.pop("other_activations", None)
    return EvaluateStep(
        model=artefacts.model,
        activations=(activations,),
        lenses=lenses,
        other_activations=other,
        results=folder / "results.json",
        item_scores=folder / "items.parquet",
        samples=folder / "samples.json",
        table=folder / "tensorboard",
        record=folder / "run.json",
        work=folder / "work",
        model_name="tiny",
        model_note="a random model",
        dataset="passages",
        dataset_note="made-up passages",
        evaluation=EvaluationSettings.model_validate(settings | changes),
        tracking=TrackingSettings(),
        trust_remote_code=False,
    )
