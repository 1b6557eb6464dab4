"""Stillhouse: five distillation studies as one DAG, from data sets and models to results/results.md.

Read `rules/` for the rules of each study, `docs/workflow.md` for what makes a result stale.
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/assets.smk"
include: "rules/context_distillation.smk"
include: "rules/report.smk"


wildcard_constraints:
    model=alternatives(CONFIGURATION.models),
    dataset=alternatives(CONFIGURATION.datasets),
    condition=r"[A-Za-z0-9_.+-]+",
    seed=r"\d+",
    cache=r"[a-z0-9_-]+",
    figure=r"[a-z_]+",


rule all:
    default_target: True
    input:
        "results/results.md",
        study_targets("figures"),


rule data:
    input:
        study_targets("data"),


rule train:
    input:
        study_targets("students"),


rule evaluate:
    input:
        study_targets("evaluations"),


rule figures:
    input:
        study_targets("figures"),
