# Needs: resources/models, results/lora_generation/data. Makes: results/lora_generation/, its figures and tables.


include: "functions/lora_generation.smk"


rule lora_generation_teachers:
    """Train the adapters of some shards of a task in one process, and judge them against the base."""
    input:
        model="resources/models/{model}",
        data=loragen_data,
    output:
        directory(LORAGEN_RUNS),
    log:
        "logs/lora_generation/{model}/teachers/{task}/seed_{seed}/shards_{shards}.log",
    benchmark:
        "logs/benchmarks/lora_generation/{model}/teachers/{task}/seed_{seed}/shards_{shards}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "lora_generation")
    resources:
        gpu=1,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=loragen_teacher_settings,
        code=code_digests("stillhouse.studies.lora_generation.teachers"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.lora_generation.teachers {params.inputs:q} output={output:q} "
        "work=work/lora_generation/{wildcards.model}/teachers/{wildcards.task}/seed_{wildcards.seed}/{wildcards.shards} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule lora_generation_collect:
    """Check every teacher adapter of a model, and join them under one manifest."""
    input:
        model="resources/models/{model}",
        teachers=LORAGEN_JOBS,
    output:
        directory(LORAGEN_ADAPTERS),
    log:
        "logs/lora_generation/{model}/collect.log",
    benchmark:
        "logs/benchmarks/lora_generation/{model}/collect.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=60,
    params:
        inputs=named_inputs,
        settings=loragen_collect_settings,
        code=code_digests("stillhouse.studies.lora_generation.collect"),
    shell:
        "python -m stillhouse.studies.lora_generation.collect {params.inputs:q} output={output:q} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule lora_generation_deltas:
    """Compute the delta activation of every teacher adapter, once for all generators."""
    input:
        model="resources/models/{model}",
        adapters=LORAGEN_ADAPTERS,
    output:
        directory(LORAGEN_DELTAS),
    log:
        "logs/lora_generation/{model}/deltas.log",
    benchmark:
        "logs/benchmarks/lora_generation/{model}/deltas.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=1,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=loragen_deltas_settings,
        code=code_digests("stillhouse.studies.lora_generation.delta_cache"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.lora_generation.delta_cache {params.inputs:q} output={output:q} "
        "work=work/lora_generation/{wildcards.model}/deltas {params.settings:q} 2>&1 | tee {log:q}"


rule lora_generation_train:
    """Train one generator; its condition decides what is compared, and which tasks it never sees."""
    input:
        model="resources/models/{model}",
        adapters=LORAGEN_ADAPTERS,
        deltas=LORAGEN_DELTAS,
        encoder=f"resources/models/{LORAGEN.text.encoder}",
    output:
        directory(LORAGEN_GENERATOR),
    log:
        "logs/lora_generation/{model}/generators/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/lora_generation/{model}/generators/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "lora_generation")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=loragen_train_settings,
        code=code_digests("stillhouse.studies.lora_generation.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.lora_generation.train {params.inputs:q} output={output:q} "
        "work=work/lora_generation/{wildcards.model}/generators/{wildcards.condition}/seed_{wildcards.seed} "
        "embeddings=work/lora_generation/embeddings {params.settings:q} 2>&1 | tee {log:q}"


rule lora_generation_evaluate:
    """Score generated adapters on held-out tasks and shards, beside everything that could do as well for less."""
    input:
        unpack(loragen_evaluate_inputs),
    output:
        results=f"{LORAGEN_EVALUATION}/results.json",
        item_scores=f"{LORAGEN_EVALUATION}/items.parquet",
        made=directory(f"{LORAGEN_EVALUATION}/adapters"),
        record=f"{LORAGEN_EVALUATION}/run.json",
    log:
        "logs/lora_generation/{model}/evaluation.log",
    benchmark:
        "logs/benchmarks/lora_generation/{model}/evaluation.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=RESOURCES.evaluation.gpus,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=loragen_evaluate_settings,
        code=code_digests("stillhouse.studies.lora_generation.evaluate"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.lora_generation.evaluate {params.inputs:q} results={output.results:q} "
        "item_scores={output.item_scores:q} made={output.made:q} record={output.record:q} "
        "work=work/lora_generation/{wildcards.model}/evaluation "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule lora_generation_figure:
    """Draw one figure of the study."""
    input:
        unpack(loragen_figure_inputs),
    output:
        png=report(
            "results/figures/lora_generation/{figure}.png",
            caption="../docs/captions/lora_generation.rst",
            category="LoRA generation",
            labels={"figure": "{figure}"},
        ),
        svg="results/figures/lora_generation/{figure}.svg",
    log:
        "logs/lora_generation/figures/{figure}.log",
    benchmark:
        "logs/benchmarks/lora_generation/figures/{figure}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=loragen_figure_code,
    shell:
        "python -m stillhouse.studies.lora_generation.figures.{wildcards.figure} {params.inputs:q} output={output.png:q} "
        "2>&1 | tee {log:q}"


rule lora_generation_report:
    """Make the study's tables (CSV and LaTeX) and its section of results.md."""
    input:
        results=expand(f"{LORAGEN_EVALUATION}/results.json", model=LORAGEN.models),
        item_scores=expand(f"{LORAGEN_EVALUATION}/items.parquet", model=LORAGEN.models),
    output:
        section=f"{LORAGEN_RESULTS}/section.md",
        tables=directory("results/tables/lora_generation"),
    log:
        "logs/lora_generation/report.log",
    benchmark:
        "logs/benchmarks/lora_generation/report.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.lora_generation.report"),
    shell:
        "python -m stillhouse.studies.lora_generation.report {params.inputs:q} section={output.section:q} tables={output.tables:q} "
        "2>&1 | tee {log:q}"
