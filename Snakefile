"""Stillhouse: five distillation studies as one DAG, from data sets and models to results/results.md.

Read `rules/` for the rules of each study, `docs/workflow.md` for what makes a result stale.
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/termination.smk"
include: "rules/common.smk"
include: "rules/assets.smk"
include: "rules/data.smk"
include: "rules/context_distillation.smk"
include: "rules/consistency_lens.smk"
include: "rules/latentwire.smk"
include: "rules/quantized_distillation.smk"
include: "rules/lora_generation.smk"
include: "rules/report.smk"


wildcard_constraints:
    study=r"[^/]+",
    model=r"[^/]+",
    pair=r"[^/]+",
    dataset=r"[^/]+",
    condition=r"[^/]+",
    seed=r"\d+",
    cache=r"[^/]+",
    activations=r"[^/]+",
    figure=r"[^/]+",
    task=r"[^/]+",
    shards=r"\d+-\d+",


rule all:
    """Make the report and every figure."""
    default_target: True
    input:
        "results/results.md",
        study_targets("figures"),


rule data:
    """Fetch the data sets and divide them."""
    input:
        study_targets("data"),


rule train:
    """Train every student, with the caches that they need."""
    input:
        study_targets("students"),


rule evaluate:
    """Score every student."""
    input:
        study_targets("evaluations"),


rule figures:
    """Draw every figure."""
    input:
        study_targets("figures"),


onerror:
    shell("python workflow_scripts/failed_logs.py {log:q}")
