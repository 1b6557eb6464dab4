# Needs: resources/models, resources/datasets. Makes: results/latentwire/, its figures and its tables.


include: "functions/latentwire.smk"


rule latentwire_teacher_cache:
    """Compute what one reader makes of the full texts once, for every channel that is distilled from it."""
    input:
        unpack(wire_cache_inputs),
    output:
        directory(f"{WIRE_RESULTS}/{{pair}}/teacher_cache/{{model}}/{{cache}}"),
    log:
        "logs/latentwire/{pair}/teacher_cache/{model}/{cache}.log",
    benchmark:
        "logs/benchmarks/latentwire/{pair}/teacher_cache/{model}/{cache}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.teacher_cache, "latentwire")
    resources:
        gpu=1,
        mem_mb=RESOURCES.teacher_cache.memory_mb,
        runtime=RESOURCES.teacher_cache.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=wire_cache_settings,
        code=code_digests("stillhouse.studies.latentwire.text_teacher"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.latentwire.text_teacher {params.inputs:q} output={output:q} "
        "work=work/latentwire/{wildcards.pair}/teacher_cache/{wildcards.model}/{wildcards.cache} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule latentwire_train:
    """Train one channel: the encoder of the texts and an adapter for each reader."""
    input:
        unpack(wire_train_inputs),
    output:
        directory(f"{WIRE_RESULTS}/{{pair}}/channels/{{condition}}/seed_{{seed}}"),
    log:
        "logs/latentwire/{pair}/channels/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/latentwire/{pair}/channels/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "latentwire")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=wire_train_settings,
        code=code_digests("stillhouse.studies.latentwire.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.latentwire.train {params.inputs:q} output={output:q} "
        "work=work/latentwire/{wildcards.pair}/channels/{wildcards.condition}/seed_{wildcards.seed} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule latentwire_evaluate:
    """Score every arm and channel of a pair, and keep the real wire files; only what is new is computed."""
    input:
        unpack(wire_evaluate_inputs),
    output:
        results=f"{WIRE_EVALUATION}/results.json",
        item_scores=f"{WIRE_EVALUATION}/items.parquet",
        record=f"{WIRE_EVALUATION}/run.json",
        wire=directory(f"{WIRE_EVALUATION}/wire"),
    log:
        "logs/latentwire/{pair}/evaluation.log",
    benchmark:
        "logs/benchmarks/latentwire/{pair}/evaluation.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=RESOURCES.evaluation.gpus,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=wire_evaluate_settings,
        code=code_digests("stillhouse.studies.latentwire.evaluate"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.latentwire.evaluate {params.inputs:q} results={output.results:q} item_scores={output.item_scores:q} record={output.record:q} wire={output.wire:q} "
        "work=work/latentwire/{wildcards.pair}/evaluation "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule latentwire_figure:
    """Draw one figure of the study."""
    input:
        unpack(wire_figure_inputs),
    output:
        png=report(
            "results/figures/latentwire/{figure}.png",
            caption="../docs/captions/latentwire.rst",
            category="LatentWire",
            labels={"figure": "{figure}"},
        ),
        svg="results/figures/latentwire/{figure}.svg",
    log:
        "logs/latentwire/figures/{figure}.log",
    benchmark:
        "logs/benchmarks/latentwire/figures/{figure}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=wire_figure_code,
    shell:
        "python -m stillhouse.studies.latentwire.figures.{wildcards.figure} {params.inputs:q} output={output.png:q} "
        "2>&1 | tee {log:q}"


rule latentwire_report:
    """Make the study's tables (CSV and LaTeX) and its section of results.md."""
    input:
        results=expand(f"{WIRE_EVALUATION}/results.json", pair=WIRE.pairs),
        item_scores=expand(f"{WIRE_EVALUATION}/items.parquet", pair=WIRE.pairs),
    output:
        section="results/latentwire/section.md",
        tables=directory("results/tables/latentwire"),
    log:
        "logs/latentwire/report.log",
    benchmark:
        "logs/benchmarks/latentwire/report.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.latentwire.report"),
    shell:
        "python -m stillhouse.studies.latentwire.report {params.inputs:q} section={output.section:q} tables={output.tables:q} "
        "2>&1 | tee {log:q}"
