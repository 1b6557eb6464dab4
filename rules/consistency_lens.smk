# Needs: resources/models, resources/datasets. Makes: results/consistency_lens/, its figures, tables and samples pages.


include: "functions/consistency_lens.smk"


rule consistency_lens_tokens:
    """Turn the corpus into tokens, once for a model."""
    input:
        model="resources/models/{model}",
        data=LENS_DATA,
    output:
        directory(LENS_TOKENS),
    log:
        "logs/consistency_lens/{model}/tokens.log",
    benchmark:
        "logs/benchmarks/consistency_lens/{model}/tokens.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=lens_tokens_settings,
        code=code_digests("stillhouse.studies.consistency_lens.tokens"),
    shell:
        "python -m stillhouse.studies.consistency_lens.tokens {params.inputs:q} output={output:q} "
        "work=work/consistency_lens/{wildcards.model}/tokens "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule consistency_lens_activations:
    """Extract one activation of each document, for all runs that agree on model, layer and position."""
    input:
        model="resources/models/{model}",
        tokens=LENS_TOKENS,
    output:
        directory(LENS_ACTIVATIONS),
    log:
        "logs/consistency_lens/{model}/activations/{activations}.log",
    benchmark:
        "logs/benchmarks/consistency_lens/{model}/activations/{activations}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=LENS.extraction.processes,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
        processes=LENS.extraction.processes,
    params:
        inputs=named_inputs,
        settings=lens_activations_settings,
        code=code_digests("stillhouse.studies.consistency_lens.activations"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.consistency_lens.activations {params.inputs:q} output={output:q} "
        "work=work/consistency_lens/{wildcards.model}/activations/{wildcards.activations} "
        "processes={resources.processes} {params.settings:q} 2>&1 | tee {log:q}"


rule consistency_lens_train:
    """Train one lens; its condition decides what learns, and from which loss."""
    input:
        unpack(lens_train_inputs),
    output:
        directory(f"{LENS_RESULTS}/{{model}}/lenses/{{condition}}/seed_{{seed}}"),
    log:
        "logs/consistency_lens/{model}/lenses/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/consistency_lens/{model}/lenses/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "consistency_lens")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=lens_train_settings,
        code=code_digests("stillhouse.studies.consistency_lens.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.consistency_lens.train {params.inputs:q} output={output:q} "
        "work=work/consistency_lens/{wildcards.model}/lenses/{wildcards.condition}/seed_{wildcards.seed} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule consistency_lens_evaluate:
    """Score every lens of a model on held-out documents, beside its baselines and controls."""
    input:
        unpack(lens_evaluate_inputs),
    output:
        results=f"{LENS_EVALUATION}/results.json",
        item_scores=f"{LENS_EVALUATION}/items.parquet",
        samples=f"{LENS_EVALUATION}/samples.json",
        table=directory(f"{LENS_EVALUATION}/tensorboard"),
        record=f"{LENS_EVALUATION}/run.json",
    log:
        "logs/consistency_lens/{model}/evaluation.log",
    benchmark:
        "logs/benchmarks/consistency_lens/{model}/evaluation.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=RESOURCES.evaluation.gpus,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=lens_evaluate_settings,
        code=code_digests("stillhouse.studies.consistency_lens.evaluate"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.consistency_lens.evaluate {params.inputs:q} results={output.results:q} "
        "item_scores={output.item_scores:q} samples={output.samples:q} table={output.table:q} record={output.record:q} "
        "work=work/consistency_lens/{wildcards.model}/evaluation "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule consistency_lens_samples:
    """Make the browsable page of a model's verbose samples."""
    input:
        samples=f"{LENS_EVALUATION}/samples.json",
    output:
        report(
            LENS_PAGE,
            caption="../docs/captions/consistency_lens_samples.rst",
            category="Consistency lens",
            labels={"samples": "{model}"},
        ),
    log:
        "logs/consistency_lens/{model}/samples.log",
    benchmark:
        "logs/benchmarks/consistency_lens/{model}/samples.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.consistency_lens.samples_page"),
    shell:
        "python -m stillhouse.studies.consistency_lens.samples_page {params.inputs:q} output={output:q} "
        "2>&1 | tee {log:q}"


rule consistency_lens_figure:
    """Draw one figure of the study."""
    input:
        unpack(lens_figure_inputs),
    output:
        png=report(
            "results/figures/consistency_lens/{figure}.png",
            caption="../docs/captions/consistency_lens.rst",
            category="Consistency lens",
            labels={"figure": "{figure}"},
        ),
        svg="results/figures/consistency_lens/{figure}.svg",
    log:
        "logs/consistency_lens/figures/{figure}.log",
    benchmark:
        "logs/benchmarks/consistency_lens/figures/{figure}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=lens_figure_code,
    shell:
        "python -m stillhouse.studies.consistency_lens.figures.{wildcards.figure} {params.inputs:q} output={output.png:q} "
        "2>&1 | tee {log:q}"


rule consistency_lens_report:
    """Make the study's tables (CSV and LaTeX) and its section of results.md."""
    input:
        results=expand(f"{LENS_EVALUATION}/results.json", model=LENS.models),
        item_scores=expand(f"{LENS_EVALUATION}/items.parquet", model=LENS.models),
    output:
        section="results/consistency_lens/section.md",
        tables=directory("results/tables/consistency_lens"),
    log:
        "logs/consistency_lens/report.log",
    benchmark:
        "logs/benchmarks/consistency_lens/report.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.consistency_lens.report"),
    shell:
        "python -m stillhouse.studies.consistency_lens.report {params.inputs:q} section={output.section:q} tables={output.tables:q} "
        "2>&1 | tee {log:q}"
