"""The shipped experiment whose model one GPU cannot train whole."""

from __future__ import annotations

from tests.config.test_experiments import CONFIG, DEFAULT, load


def test_full_fine_tuning_of_8b_is_sharded_over_several_gpus_in_every_run() -> None:
    configuration = load(DEFAULT, CONFIG / "experiments" / "context_qwen3_8b_full.yaml")
    study = configuration.context_distillation
    assert configuration.resources.training.gpus > 1
    assert study.trained_conditions
    for condition in study.trained_conditions:
        training = study.run_settings("qwen3_8b", condition).training
        assert (training.method, training.sharding) == ("full", "fsdp"), condition
