# What the rules of context distillation read from the configuration: their targets, inputs and settings.

CONTEXT = CONFIGURATION.context_distillation
CONTEXT_RESULTS = "results/context_distillation"
CONTEXT_FIGURES = (
    "summary",
    "checkpoint_curve",
    "ablation_curve",
    "ablation_bars",
    "loss",
    *["sweep"] * bool(CONTEXT.sweeps),
)
CONTEXT_DATA = f"{CONTEXT_RESULTS}/data/{CONTEXT.task.dataset}"
CONTEXT_STUDENTS = [
    f"{CONTEXT_RESULTS}/{{model}}/students/{condition}/seed_{seed}"
    for condition in CONTEXT.trained_conditions
    for seed in CONTEXT.seeds
]
CONTEXT_TRANSFER = expand(
    "resources/datasets/{dataset}", dataset=CONTEXT.evaluation.transfer
)
CONTEXT_EVALUATION = f"{CONTEXT_RESULTS}/{{model}}/evaluation"
CONTEXT_CACHES = [
    (model, cache)
    for model in CONTEXT.models
    for cache in CONTEXT.caches(model).values()
]

CONTEXT_DISTILLATION_TARGETS = {
    "data": [CONTEXT_DATA],
    "students": expand(CONTEXT_STUDENTS, model=CONTEXT.models),
    "evaluations": expand(f"{CONTEXT_EVALUATION}/results.json", model=CONTEXT.models),
    "figures": expand(
        "results/figures/context_distillation/{figure}.png", figure=CONTEXT_FIGURES
    ),
    "section": ["results/context_distillation/section.md"],
    "records": [
        f"resources/datasets/{CONTEXT.task.dataset}",
        *CONTEXT_TRANSFER,
        CONTEXT_DATA,
        *dict.fromkeys(
            f"resources/models/{name}"
            for name in (
                *CONTEXT.models,
                *(cache.model for _, cache in CONTEXT_CACHES if cache.model),
            )
        ),
        *dict.fromkeys(
            f"{CONTEXT_RESULTS}/{model}/task_teacher"
            for model, cache in CONTEXT_CACHES
            if cache.adapter
        ),
        *[
            f"{CONTEXT_RESULTS}/{model}/teacher_cache/{cache.name}"
            for model, cache in CONTEXT_CACHES
        ],
        *expand(CONTEXT_STUDENTS, model=CONTEXT.models),
        *expand(f"{CONTEXT_EVALUATION}/run.json", model=CONTEXT.models),
    ],
}


def context_cache_inputs(wildcards):
    """What a teacher cache reads: the teaching model, its task LoRA where asked, the student's tokenizer, the data."""
    caches = CONTEXT.caches(wildcards.model)
    cache = caches[known("teacher cache", wildcards.cache, caches)]
    inputs = {
        "data": CONTEXT_DATA,
        "student": f"resources/models/{wildcards.model}",
        "teacher": f"resources/models/{cache.model or wildcards.model}",
    }
    if cache.adapter:
        inputs["adapter"] = f"{CONTEXT_RESULTS}/{wildcards.model}/task_teacher"
    return inputs


def context_cache_settings(wildcards):
    cache = CONTEXT.caches(wildcards.model)[wildcards.cache]
    entry = CONFIGURATION.models[cache.model or wildcards.model]
    return settings(cache=cache, trust_remote_code=entry.trust_remote_code)


def context_train_inputs(wildcards):
    """What a student reads: its model, the data, and the cached targets of its teacher."""
    known("condition", wildcards.condition, CONTEXT.trained_conditions)
    run = CONTEXT.run_settings(wildcards.model, wildcards.condition)
    inputs = {"model": f"resources/models/{wildcards.model}", "data": CONTEXT_DATA}
    if run.cache:
        inputs["cache"] = (
            f"{CONTEXT_RESULTS}/{wildcards.model}/teacher_cache/{run.cache.name}"
        )
    return inputs


def context_train_settings(wildcards):
    return settings(
        condition=wildcards.condition,
        seed=int(wildcards.seed),
        run=CONTEXT.run_settings(wildcards.model, wildcards.condition).leaves(),
        tracking=CONFIGURATION.tracking,
        trust_remote_code=CONFIGURATION.models[wildcards.model].trust_remote_code,
    )


def context_task_teacher_settings(wildcards):
    return settings(
        condition="task_teacher",
        seed=CONTEXT.seeds[0],
        run=CONTEXT.task_teacher_settings(wildcards.model).leaves(),
        tracking=CONFIGURATION.tracking,
        trust_remote_code=CONFIGURATION.models[wildcards.model].trust_remote_code,
    )


def context_evaluate_settings(wildcards):
    entry = CONFIGURATION.models[wildcards.model]
    return settings(
        model_name=wildcards.model,
        model_note=entry.note,
        dataset=CONTEXT.task.dataset,
        dataset_note=CONFIGURATION.datasets[CONTEXT.task.dataset].note,
        task=CONFIGURATION.datasets[CONTEXT.task.dataset].task,
        transfer_tasks={
            name: CONFIGURATION.datasets[name].task
            for name in CONTEXT.evaluation.transfer
        },
        conditions=CONTEXT.conditions,
        repeated_mistakes=CONTEXT.repeated_mistakes(wildcards.model),
        prompt_format=CONTEXT.subject_defaults(wildcards.model).prompt_format,
        evaluation=CONTEXT.evaluation,
        served_by_vllm=entry.vllm,
        trust_remote_code=entry.trust_remote_code,
    )


def context_figure_inputs(wildcards):
    """What a figure reads: the evaluations, and for the loss the students' training curves."""
    if known("figure", wildcards.figure, CONTEXT_FIGURES) == "loss":
        return {"students": expand(CONTEXT_STUDENTS, model=CONTEXT.models)}
    return {
        "results": expand(f"{CONTEXT_EVALUATION}/results.json", model=CONTEXT.models),
        "item_scores": expand(
            f"{CONTEXT_EVALUATION}/items.parquet", model=CONTEXT.models
        ),
    }


def context_figure_code(wildcards):
    known("figure", wildcards.figure, CONTEXT_FIGURES)
    return code_digests(
        f"stillhouse.studies.context_distillation.figures.{wildcards.figure}"
    )
