# What the rules of the consistency lens read from the configuration: their targets, inputs and settings.

LENS = CONFIGURATION.consistency_lens
LENS_RESULTS = "results/consistency_lens"
LENS_DATA = f"{LENS_RESULTS}/data/{LENS.task.dataset}"
LENS_TOKENS = f"{LENS_RESULTS}/{{model}}/tokens"
LENS_ACTIVATIONS = f"{LENS_RESULTS}/{{model}}/activations/{{activations}}"
LENS_LENSES = [
    f"{LENS_RESULTS}/{{model}}/lenses/{condition}/seed_{seed}"
    for condition in LENS.trained_conditions
    for seed in LENS.seeds
]
LENS_EVALUATION = (
    f"{LENS.evaluation.output_directory}/{{model}}"
    if LENS.evaluation.output_directory
    else f"{LENS_RESULTS}/{{model}}/evaluation"
)
LENS_PAGE = f"{LENS_RESULTS}/{{model}}/samples.html"
LENS_LAYERS = {
    LENS.run_settings(model, condition).lens.layer
    for model in LENS.models
    for condition in LENS.trained_conditions
}
LENS_FIGURES = (
    "losses",
    "controls",
    "best_of_k",
    "schedules",
    *["variance_by_layer"] * (len(LENS_LAYERS) > 1),
    *["sweep"] * bool(LENS.sweeps),
)
LENS_TRAINING_FIGURES = ("losses", "schedules")

CONSISTENCY_LENS_TARGETS = {
    "data": [LENS_DATA],
    "students": expand(LENS_LENSES, model=LENS.models),
    "evaluations": expand(f"{LENS_EVALUATION}/results.json", model=LENS.models),
    "figures": expand(
        "results/figures/consistency_lens/{figure}.png", figure=LENS_FIGURES
    )
    + expand(LENS_PAGE, model=LENS.models),
    "section": ["results/consistency_lens/section.md"],
    "records": [
        f"resources/datasets/{LENS.task.dataset}",
        LENS_DATA,
        *expand("resources/models/{model}", model=LENS.models),
        *expand(LENS_TOKENS, model=LENS.models),
        *[
            LENS_ACTIVATIONS.format(model=model, activations=activations)
            for model in LENS.models
            for activations in LENS.activations(model)
        ],
        *expand(LENS_LENSES, model=LENS.models),
        *expand(f"{LENS_EVALUATION}/run.json", model=LENS.models),
    ],
}


def lens_trusts_code(wildcards):
    return CONFIGURATION.models[wildcards.model].trust_remote_code


def lens_tokens_settings(wildcards):
    return settings(tokens=LENS.tokens, trust_remote_code=lens_trusts_code(wildcards))


def lens_activations_settings(wildcards):
    extractions = LENS.activations(wildcards.model)
    known("activations", wildcards.activations, extractions)
    return settings(
        activations=extractions[wildcards.activations],
        batch_tokens=LENS.extraction.batch_tokens,
        shard_documents=LENS.tokens.shard_documents,
        trust_remote_code=lens_trusts_code(wildcards),
    )


def lens_train_inputs(wildcards):
    """What a lens reads: its model, and activations, or the tokens that it computes them from."""
    known("condition", wildcards.condition, LENS.trained_conditions)
    run = LENS.run_settings(wildcards.model, wildcards.condition)
    inputs = {"model": f"resources/models/{wildcards.model}"}
    if run.activations == "on_the_fly":
        return inputs | {"tokens": LENS_TOKENS}
    name = run.extraction.name
    return inputs | {
        "activations": f"{LENS_RESULTS}/{wildcards.model}/activations/{name}"
    }


def lens_train_settings(wildcards):
    return settings(
        condition=wildcards.condition,
        seed=int(wildcards.seed),
        run=LENS.run_settings(wildcards.model, wildcards.condition).leaves(),
        tracking=CONFIGURATION.tracking,
        trust_remote_code=lens_trusts_code(wildcards),
    )


def lens_evaluate_inputs(wildcards):
    """All lenses of a model, the activations that they explain, and other ones to score where asked."""
    inputs = {
        "model": f"resources/models/{wildcards.model}",
        "lenses": LENS_LENSES,
        "activations": [
            f"{LENS_RESULTS}/{wildcards.model}/activations/{name}"
            for name in LENS.activations(wildcards.model)
        ],
    }
    if LENS.evaluation.activation_directory:
        inputs["other_activations"] = LENS.evaluation.activation_directory
    return inputs


def lens_evaluate_settings(wildcards):
    return settings(
        model_name=wildcards.model,
        model_note=CONFIGURATION.models[wildcards.model].note,
        dataset=LENS.task.dataset,
        dataset_note=CONFIGURATION.datasets[LENS.task.dataset].note,
        evaluation=LENS.evaluation,
        tracking=CONFIGURATION.tracking,
        trust_remote_code=lens_trusts_code(wildcards),
    )


def lens_figure_inputs(wildcards):
    """What a figure reads: the evaluations, or the training curves of every lens."""
    if known("figure", wildcards.figure, LENS_FIGURES) in LENS_TRAINING_FIGURES:
        return {"lenses": expand(LENS_LENSES, model=LENS.models)}
    return {
        "results": expand(f"{LENS_EVALUATION}/results.json", model=LENS.models),
        "item_scores": expand(f"{LENS_EVALUATION}/items.parquet", model=LENS.models),
    }


def lens_figure_code(wildcards):
    known("figure", wildcards.figure, LENS_FIGURES)
    return code_digests(
        f"stillhouse.studies.consistency_lens.figures.{wildcards.figure}"
    )
