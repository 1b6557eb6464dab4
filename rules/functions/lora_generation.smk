# What the rules of LoRA generation read from the configuration: their targets, inputs and settings.

LORAGEN = CONFIGURATION.lora_generation
LORAGEN_TEACHERS = LORAGEN.teachers
LORAGEN_RESULTS = "results/lora_generation"
LORAGEN_RUNS = (
    f"{LORAGEN_RESULTS}/{{model}}/teachers/{{task}}/seed_{{seed}}/shards_{{shards}}"
)
LORAGEN_ADAPTERS = f"{LORAGEN_RESULTS}/{{model}}/adapters"
LORAGEN_DELTAS = f"{LORAGEN_RESULTS}/{{model}}/deltas"
LORAGEN_GENERATOR = (
    f"{LORAGEN_RESULTS}/{{model}}/generators/{{condition}}/seed_{{seed}}"
)
LORAGEN_EVALUATION = f"{LORAGEN_RESULTS}/{{model}}/evaluation"
LORAGEN_FIGURES = (
    "accuracy",
    "delta_map",
    "ablation",
    "cosine",
    "training",
    *["sweep"] * bool(LORAGEN.sweeps),
)
LORAGEN_JOBS = expand(
    LORAGEN_RUNS,
    task=LORAGEN.tasks,
    seed=LORAGEN_TEACHERS.seeds,
    shards=LORAGEN_TEACHERS.jobs,
    allow_missing=True,
)
LORAGEN_GENERATORS = expand(
    LORAGEN_GENERATOR,
    condition=LORAGEN.trained_conditions,
    seed=LORAGEN.seeds,
    allow_missing=True,
)

LORA_GENERATION_TARGETS = {
    "data": [f"{LORAGEN_RESULTS}/data/{task.dataset}" for task in LORAGEN.divided],
    "students": expand(LORAGEN_GENERATORS, model=LORAGEN.models),
    "evaluations": expand(f"{LORAGEN_EVALUATION}/results.json", model=LORAGEN.models),
    "figures": expand(
        "results/figures/lora_generation/{figure}.png", figure=LORAGEN_FIGURES
    ),
    "section": [f"{LORAGEN_RESULTS}/section.md"],
    "records": [
        *[f"resources/datasets/{task.dataset}" for task in LORAGEN.divided],
        *[f"{LORAGEN_RESULTS}/data/{task.dataset}" for task in LORAGEN.divided],
        *expand(
            "resources/models/{model}", model=[*LORAGEN.models, LORAGEN.text.encoder]
        ),
        *expand(
            [
                *LORAGEN_JOBS,
                LORAGEN_ADAPTERS,
                LORAGEN_DELTAS,
                *LORAGEN_GENERATORS,
                f"{LORAGEN_EVALUATION}/run.json",
            ],
            model=LORAGEN.models,
        ),
    ],
}


def loragen_trusts_code(wildcards):
    return CONFIGURATION.models[wildcards.model].trust_remote_code


def loragen_data(wildcards):
    """The division of a task's data set."""
    task = known("task", wildcards.task, LORAGEN.tasks)
    return f"{LORAGEN_RESULTS}/data/{LORAGEN.task_settings[task].dataset}"


def loragen_teacher_settings(wildcards):
    """What the training of some shards reads."""
    known("shards", wildcards.shards, LORAGEN_TEACHERS.jobs)
    task = LORAGEN.task_settings[wildcards.task]
    first, last = wildcards.shards.split("-")
    leaves = {
        name: getattr(LORAGEN_TEACHERS, name)
        for name in (
            "shard_examples",
            "prompts",
            "loss_tokens",
            "shared_start",
            "better_by",
            "scored_items",
            "steps",
        )
    }
    if task.style == "worked":
        leaves |= {
            "engine": LORAGEN.evaluation.engine,
            "generation": LORAGEN.evaluation.generation,
        }
    return settings(
        **leaves,
        model_name=wildcards.model,
        task=wildcards.task,
        style=task.style,
        seed=int(wildcards.seed),
        first_shard=int(first),
        last_shard=int(last),
        score=LORAGEN.evaluation.score,
        batch_tokens=LORAGEN.evaluation.batch_tokens,
        training=LORAGEN_TEACHERS.training,
        tracking=CONFIGURATION.tracking,
        trust_remote_code=loragen_trusts_code(wildcards),
    )


def loragen_collect_settings(wildcards):
    return settings(expected=[teacher.name for teacher in LORAGEN.adapters])


def loragen_deltas_settings(wildcards):
    return settings(
        probes=LORAGEN.probes, trust_remote_code=loragen_trusts_code(wildcards)
    )


def loragen_train_settings(wildcards):
    known("condition", wildcards.condition, LORAGEN.trained_conditions)
    return settings(
        model_name=wildcards.model,
        condition=wildcards.condition,
        seed=int(wildcards.seed),
        run=LORAGEN.run_settings(wildcards.model, wildcards.condition).leaves(),
        shards=LORAGEN_TEACHERS.roles,
        text=LORAGEN.text,
        tracking=CONFIGURATION.tracking,
        trust_remote_code=loragen_trusts_code(wildcards),
    )


def loragen_evaluate_inputs(wildcards):
    """Everything that is scored: teachers, their deltas, generators, and the tasks' data."""
    return {
        "model": f"resources/models/{wildcards.model}",
        "encoder": f"resources/models/{LORAGEN.text.encoder}",
        "data": [f"{LORAGEN_RESULTS}/data/{task.dataset}" for task in LORAGEN.divided],
        "adapters": LORAGEN_ADAPTERS,
        "deltas": LORAGEN_DELTAS,
        "generators": LORAGEN_GENERATORS,
    }


def loragen_evaluate_settings(wildcards):
    return settings(
        model_name=wildcards.model,
        model_note=CONFIGURATION.models[wildcards.model].note,
        tasks=list(LORAGEN.tasks),
        datasets=[task.dataset for task in LORAGEN.divided],
        dataset_notes=[
            CONFIGURATION.datasets[task.dataset].note for task in LORAGEN.divided
        ],
        styles=[task.style for task in LORAGEN.divided],
        shards=LORAGEN_TEACHERS.roles,
        text=LORAGEN.text,
        precision=LORAGEN.precision,
        evaluation=LORAGEN.evaluation,
        few_prompt_training=LORAGEN.few_prompt_training,
        loss_tokens=LORAGEN_TEACHERS.loss_tokens,
        trust_remote_code=loragen_trusts_code(wildcards),
    )


def loragen_figure_inputs(wildcards):
    """What a figure reads: the evaluations, or the training curves of every generator."""
    if known("figure", wildcards.figure, LORAGEN_FIGURES) == "training":
        return {"generators": expand(LORAGEN_GENERATORS, model=LORAGEN.models)}
    return {
        "results": expand(f"{LORAGEN_EVALUATION}/results.json", model=LORAGEN.models),
        "item_scores": expand(
            f"{LORAGEN_EVALUATION}/items.parquet", model=LORAGEN.models
        ),
    }


def loragen_figure_code(wildcards):
    known("figure", wildcards.figure, LORAGEN_FIGURES)
    return code_digests(
        f"stillhouse.studies.lora_generation.figures.{wildcards.figure}"
    )
