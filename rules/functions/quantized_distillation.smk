# What the rules of quantised distillation read from the configuration: their targets, inputs and settings.

from stillhouse.config.quantization import this_machine
from stillhouse.studies.quantized_distillation.evaluation_settings import (
    CALIBRATED,
    calibration_objection,
    reasons_not_run,
)

QUANT = CONFIGURATION.quantized_distillation
QUANT_RESULTS = "results/quantized_distillation"
QUANT_FIGURES = (
    "perplexity_curve",
    "accuracy",
    "sweep_lr",
    "beta_lambda",
    "recovered",
    *["sweep"] * bool(QUANT.sweeps),
)
QUANT_DATA = f"{QUANT_RESULTS}/data/{QUANT.task.dataset}"
QUANT_STUDENTS = [
    f"{QUANT_RESULTS}/{{model}}/students/{condition}/seed_{seed}"
    for condition in QUANT.trained_conditions
    for seed in QUANT.seeds
]
QUANT_EVALUATION = f"{QUANT_RESULTS}/{{model}}/evaluation"
QUANT_SETS = [
    f"resources/datasets/{one.dataset}"
    for one in (*QUANT.evaluation.tasks.values(), *QUANT.evaluation.texts.values())
]
LLMCOMPRESSOR = "resources/environments/llmcompressor"


def quant_rounded(model):
    """The formats of a model's `ptq` conditions: `ptq` for the baselines' own, `ptq-<format>` for each other."""
    if "ptq" not in QUANT.conditions:
        return {}
    own, *others = QUANT.formats(model).values()
    return {"ptq": own, **{f"ptq-{one.name}": one for one in others}}


def quant_exports(model):
    """Condition and seed of every converted model, in the order of tables; 0 for what is not trained."""
    calibrated = [name for name in CALIBRATED if name in QUANT.conditions]
    untrained = [(name, 0) for name in (*quant_rounded(model), *calibrated)]
    return untrained + [
        (name, seed) for name in QUANT.trained_conditions for seed in QUANT.seeds
    ]


def quant_export_paths(model):
    """The directories of `quant_exports`."""
    return [
        f"{QUANT_RESULTS}/{model}/exported/{condition}/seed_{seed}"
        for condition, seed in quant_exports(model)
    ]


QUANTIZED_DISTILLATION_TARGETS = {
    "data": [QUANT_DATA],
    "students": expand(QUANT_STUDENTS, model=QUANT.models),
    "evaluations": expand(f"{QUANT_EVALUATION}/results.json", model=QUANT.models),
    "figures": expand(
        "results/figures/quantized_distillation/{figure}.png", figure=QUANT_FIGURES
    ),
    "section": [f"{QUANT_RESULTS}/section.md"],
    "records": [
        f"resources/datasets/{QUANT.task.dataset}",
        *dict.fromkeys(QUANT_SETS),
        QUANT_DATA,
        *expand("resources/models/{model}", model=QUANT.models),
        *[
            f"{QUANT_RESULTS}/{model}/teacher_cache/{cache}"
            for model in QUANT.models
            for cache in QUANT.caches(model)
        ],
        *expand(QUANT_STUDENTS, model=QUANT.models),
        *[path for model in QUANT.models for path in quant_export_paths(model)],
        *expand(f"{QUANT_EVALUATION}/run.json", model=QUANT.models),
    ],
}


def runnable(what, objection):
    """Refuse what this machine cannot run; jobs that a cluster runs elsewhere find out there."""
    if objection and not workflow.non_local_exec:
        # Of a WorkflowError Snakemake makes "nothing to be done" where an earlier run left the results.
        raise SystemExit(f"quantized_distillation: {what}: {objection}")


def quant_model(wildcards):
    """The directory of the model that a path names."""
    return (
        f"resources/models/{known('model of the study', wildcards.model, QUANT.models)}"
    )


def quant_trust(wildcards):
    return CONFIGURATION.models[wildcards.model].trust_remote_code


def quant_cache_inputs(wildcards):
    """What the teacher cache reads."""
    known("teacher cache", wildcards.cache, QUANT.caches(wildcards.model))
    return {"model": quant_model(wildcards), "data": QUANT_DATA}


def quant_cache_settings(wildcards):
    return settings(
        cache=QUANT.caches(wildcards.model)[wildcards.cache],
        trust_remote_code=quant_trust(wildcards),
    )


def quant_train_inputs(wildcards):
    """What a student reads: its model, the data, the text of its curve, and its teacher's cached targets."""
    known("condition", wildcards.condition, QUANT.trained_conditions)
    run = QUANT.run_settings(wildcards.model, wildcards.condition)
    runnable(f"condition {wildcards.condition}", run.format.objection(this_machine()))
    inputs = {
        "model": quant_model(wildcards),
        "data": QUANT_DATA,
        "text": f"resources/datasets/{run.validation.text}",
    }
    if run.cache:
        inputs["cache"] = (
            f"{QUANT_RESULTS}/{wildcards.model}/teacher_cache/{run.cache.name}"
        )
    return inputs


def quant_train_settings(wildcards):
    return settings(
        condition=wildcards.condition,
        seed=int(wildcards.seed),
        run=QUANT.run_settings(wildcards.model, wildcards.condition).leaves(),
        tracking=CONFIGURATION.tracking,
        trust_remote_code=quant_trust(wildcards),
    )


def quant_export_format(wildcards):
    """The weight format that a condition is converted to."""
    rounded = quant_rounded(wildcards.model)
    known(
        "condition",
        wildcards.condition,
        [*rounded, *CALIBRATED, *QUANT.trained_conditions],
    )
    if wildcards.condition in rounded:
        return rounded[wildcards.condition]
    return QUANT.run_settings(wildcards.model, wildcards.condition).format


def quant_export_inputs(wildcards):
    """What a conversion reads: the model, and the student whose adapter is merged into it."""
    chosen = quant_export_format(wildcards)
    runnable(f"condition {wildcards.condition}", chosen.objection(this_machine()))
    inputs = {"model": quant_model(wildcards)}
    if wildcards.condition in QUANT.trained_conditions:
        inputs["student"] = (
            f"{QUANT_RESULTS}/{wildcards.model}/students/{wildcards.condition}/seed_{wildcards.seed}"
        )
    return inputs


def quant_export_settings(wildcards):
    return settings(
        format=quant_export_format(wildcards),
        selection=QUANT.export.selection,
        precision=QUANT.subject_defaults(wildcards.model).training.precision,
        trust_remote_code=quant_trust(wildcards),
    )


def quant_calibrate_inputs(wildcards):
    """What a calibrated rounding reads; one that this machine cannot run is refused."""
    runnable(
        f"condition {wildcards.condition}",
        calibration_objection(wildcards.condition, this_machine()),
    )
    return {
        "model": quant_model(wildcards),
        "data": QUANT_DATA,
        "environment": LLMCOMPRESSOR,
    }


def quant_calibrate_settings(wildcards):
    run = QUANT.subject_defaults(wildcards.model)
    return settings(
        method=wildcards.condition,
        format=QUANT.baselines.weight_format(wildcards.condition, run.format),
        baselines=QUANT.baselines,
        rendering=quant_rendering(wildcards),
        precision=run.training.precision,
        trust_remote_code=quant_trust(wildcards),
    )


def quant_rendering(wildcards):
    """How the model's prompts are made."""
    run = QUANT.subject_defaults(wildcards.model)
    return {
        "prompt_format": run.prompt_format,
        "max_length": run.max_length,
        "response_room": run.response_room,
    }


def quant_evaluate_inputs(wildcards):
    """What an evaluation reads: the model, everything that was made of it, the test data, tasks and texts."""
    inputs = {
        "model": quant_model(wildcards),
        "data": QUANT_DATA,
        "exported": quant_export_paths(wildcards.model),
        "datasets": QUANT_SETS,
    }
    if QUANT_STUDENTS:
        inputs["students"] = expand(QUANT_STUDENTS, model=wildcards.model)
    return inputs


def quant_evaluate_settings(wildcards):
    exports = quant_exports(wildcards.model)
    return settings(
        model_name=wildcards.model,
        model_note=CONFIGURATION.models[wildcards.model].note,
        trust_remote_code=quant_trust(wildcards),
        dataset=QUANT.task.dataset,
        dataset_note=CONFIGURATION.datasets[QUANT.task.dataset].note,
        set_notes={
            name: CONFIGURATION.datasets[one.dataset].note
            for name, one in (
                *QUANT.evaluation.tasks.items(),
                *QUANT.evaluation.texts.items(),
            )
        },
        rendering=quant_rendering(wildcards),
        exported_conditions=[condition for condition, _ in exports],
        exported_seeds=[seed for _, seed in exports],
        not_run=reasons_not_run(QUANT.conditions),
        evaluation=QUANT.evaluation,
    )


def quant_figure_inputs(wildcards):
    """What a figure reads: the evaluations, or what training left for the curve of it."""
    if known("figure", wildcards.figure, QUANT_FIGURES) == "perplexity_curve":
        return {"students": expand(QUANT_STUDENTS, model=QUANT.models)}
    return {
        "results": expand(f"{QUANT_EVALUATION}/results.json", model=QUANT.models),
        "item_scores": expand(f"{QUANT_EVALUATION}/items.parquet", model=QUANT.models),
    }


def quant_figure_code(wildcards):
    known("figure", wildcards.figure, QUANT_FIGURES)
    return code_digests(
        f"stillhouse.studies.quantized_distillation.figures.{wildcards.figure}"
    )
