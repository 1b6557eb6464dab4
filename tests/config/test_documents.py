"""The committed configuration documents are those that the models make."""

from __future__ import annotations

from pathlib import Path

import yaml

from stillhouse.studies.configuration import Configuration, embedded_configuration
from stillhouse.studies.documents import documents

REPOSITORY = Path(__file__).resolve().parents[2]


def test_generated_documents_are_up_to_date() -> None:
    for name, text in documents().items():
        assert (REPOSITORY / name).read_text() == text, f"{name} is out of date: run make generate"


def test_the_default_file_is_the_embedded_configuration() -> None:
    loaded = Configuration.model_validate(yaml.safe_load((REPOSITORY / "config/config.yaml").read_text()))
    assert loaded == embedded_configuration()


def test_the_published_defaults_are_those_of_the_models() -> None:
    run = Configuration().context_distillation.defaults
    training, lora = run.training, run.training.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.05)
    assert (training.learning_rate, training.steps, training.batch_size) == (2e-4, 1000, 32)
    assert (training.schedule.kind, training.schedule.warmup_steps) == ("cosine", 50)
    assert (training.weight_decay, training.max_gradient_norm, training.save_every) == (0.01, 1.0, 200)
    assert (run.distillation.top_k, run.distillation.weight, run.teacher.context.shots) == (256, 0.5, 8)
    assert (run.teacher.max_length, run.max_length) == (4096, 512)
    assert Configuration().context_distillation.seeds == (42,)
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(lora.target_modules) == projections
