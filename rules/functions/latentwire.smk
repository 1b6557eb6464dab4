# What the rules of LatentWire read from the configuration: their targets, inputs and settings.

WIRE = CONFIGURATION.latentwire
WIRE_RESULTS = "results/latentwire"
WIRE_FIGURES = (
    "f1_vs_bytes",
    "arms",
    "first_token",
    "diagnostics",
    "training",
    *["sweep"] * bool(WIRE.sweeps),
)
WIRE_DATA = f"{WIRE_RESULTS}/data/{WIRE.task.dataset}"
WIRE_CHANNELS = [
    f"{WIRE_RESULTS}/{{pair}}/channels/{condition}/seed_{seed}"
    for condition in WIRE.trained_conditions
    for seed in WIRE.seeds
]
WIRE_EVALUATION = f"{WIRE_RESULTS}/{{pair}}/evaluation"
WIRE_MODELS = sorted(
    {model for pair in WIRE.pairs for model in WIRE.pair_settings[pair].models}
)
WIRE_ENCODERS = sorted(
    {
        run.encoder.model
        for pair in WIRE.pairs
        for condition in WIRE.trained_conditions
        if (run := WIRE.run_settings(pair, condition)).encoder.kind == "sentence"
    }
)
WIRE_CACHES = [
    f"{WIRE_RESULTS}/{pair}/teacher_cache/{model}/{cache}"
    for pair in WIRE.pairs
    for model in WIRE.pair_settings[pair].models
    for cache in WIRE.caches(pair)
]

LATENTWIRE_TARGETS = {
    "data": [WIRE_DATA],
    "students": expand(WIRE_CHANNELS, pair=WIRE.pairs),
    "evaluations": expand(f"{WIRE_EVALUATION}/results.json", pair=WIRE.pairs),
    "figures": expand("results/figures/latentwire/{figure}.png", figure=WIRE_FIGURES),
    "section": ["results/latentwire/section.md"],
    "records": [
        f"resources/datasets/{WIRE.task.dataset}",
        WIRE_DATA,
        *expand("resources/models/{model}", model=[*WIRE_MODELS, *WIRE_ENCODERS]),
        *WIRE_CACHES,
        *expand(WIRE_CHANNELS, pair=WIRE.pairs),
        *expand(f"{WIRE_EVALUATION}/run.json", pair=WIRE.pairs),
    ],
}


def wire_pair(wildcards):
    """The pair of readers that a path names."""
    return WIRE.pair_settings[known("pair", wildcards.pair, WIRE.pairs)]


def wire_models(wildcards):
    """The directories of a pair's models, in its order."""
    return [f"resources/models/{model}" for model in wire_pair(wildcards).models]


def wire_trust(wildcards):
    """Whether each of a pair's models may bring code of its own."""
    return [
        CONFIGURATION.models[model].trust_remote_code
        for model in wire_pair(wildcards).models
    ]


def wire_cache_inputs(wildcards):
    """What a text teacher's cache reads: the model, which must be of the pair, and the data."""
    known("model of the pair", wildcards.model, wire_pair(wildcards).models)
    known("teacher cache", wildcards.cache, WIRE.caches(wildcards.pair))
    return {"model": f"resources/models/{wildcards.model}", "data": WIRE_DATA}


def wire_cache_settings(wildcards):
    return settings(
        name=wildcards.model,
        cache=WIRE.caches(wildcards.pair)[wildcards.cache],
        max_text_bytes=WIRE.task.max_text_bytes,
        trust_remote_code=CONFIGURATION.models[wildcards.model].trust_remote_code,
    )


def wire_train_inputs(wildcards):
    """What a channel reads: both models, its sentence encoder, the data, and the cached targets of its teachers."""
    pair = wire_pair(wildcards)
    known("condition", wildcards.condition, WIRE.trained_conditions)
    run = WIRE.run_settings(wildcards.pair, wildcards.condition)
    inputs = {"models": wire_models(wildcards), "data": WIRE_DATA}
    if run.encoder.kind == "sentence":
        inputs["encoder"] = f"resources/models/{run.encoder.model}"
    if run.cache:
        inputs["caches"] = [
            f"{WIRE_RESULTS}/{wildcards.pair}/teacher_cache/{model}/{run.cache.name}"
            for model in pair.models
        ]
    return inputs


def wire_train_settings(wildcards):
    return settings(
        names=wire_pair(wildcards).models,
        condition=wildcards.condition,
        seed=int(wildcards.seed),
        run=WIRE.run_settings(wildcards.pair, wildcards.condition).leaves(),
        max_text_bytes=WIRE.task.max_text_bytes,
        tracking=CONFIGURATION.tracking,
        trust_remote_code=wire_trust(wildcards),
    )


def wire_evaluate_inputs(wildcards):
    """What an evaluation reads: both models, the sentence encoders, the data and every channel of the pair."""
    inputs = {
        "models": wire_models(wildcards),
        "data": WIRE_DATA,
        "channels": expand(WIRE_CHANNELS, pair=wildcards.pair),
    }
    if WIRE_ENCODERS:
        inputs["encoders"] = expand("resources/models/{model}", model=WIRE_ENCODERS)
    return inputs


def wire_evaluate_settings(wildcards):
    models = wire_pair(wildcards).models
    return settings(
        pair=wildcards.pair,
        model_names=models,
        model_notes=[CONFIGURATION.models[model].note for model in models],
        trust_remote_code=wire_trust(wildcards),
        dataset=WIRE.task.dataset,
        dataset_note=CONFIGURATION.datasets[WIRE.task.dataset].note,
        max_text_bytes=WIRE.task.max_text_bytes,
        evaluation=WIRE.evaluation,
    )


def wire_figure_inputs(wildcards):
    """What a figure reads: the evaluations, or what training left for the curves of it."""
    known("figure", wildcards.figure, WIRE_FIGURES)
    if wildcards.figure in ("diagnostics", "training"):
        return {"channels": expand(WIRE_CHANNELS, pair=WIRE.pairs)}
    return {
        "results": expand(f"{WIRE_EVALUATION}/results.json", pair=WIRE.pairs),
        "item_scores": expand(f"{WIRE_EVALUATION}/items.parquet", pair=WIRE.pairs),
    }


def wire_figure_code(wildcards):
    known("figure", wildcards.figure, WIRE_FIGURES)
    return code_digests(f"stillhouse.studies.latentwire.figures.{wildcards.figure}")
