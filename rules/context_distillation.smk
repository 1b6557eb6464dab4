# Needs: resources/models, resources/datasets. Makes: results/context_distillation/, its figures and its tables.


include: "functions/context_distillation.smk"


rule context_distillation_task_teacher:
    """Train the LoRA that condition lora_teacher teaches with on the task itself."""
    input:
        model="resources/models/{model}",
        data=CONTEXT_DATA,
    output:
        directory(f"{CONTEXT_RESULTS}/{{model}}/task_teacher"),
    log:
        "logs/context_distillation/{model}/task_teacher.log",
    benchmark:
        "logs/benchmarks/context_distillation/{model}/task_teacher.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "context_distillation")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=context_task_teacher_settings,
        code=code_digests("stillhouse.studies.context_distillation.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.context_distillation.train {params.inputs:q} output={output:q} "
        "work=work/context_distillation/{wildcards.model}/task_teacher "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule context_distillation_teacher_cache:
    """Compute a teacher's targets once, for every condition, sweep point and seed that shares them."""
    input:
        unpack(context_cache_inputs),
    output:
        directory(f"{CONTEXT_RESULTS}/{{model}}/teacher_cache/{{cache}}"),
    log:
        "logs/context_distillation/{model}/teacher_cache/{cache}.log",
    benchmark:
        "logs/benchmarks/context_distillation/{model}/teacher_cache/{cache}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.teacher_cache, "context_distillation")
    resources:
        gpu=1,
        mem_mb=RESOURCES.teacher_cache.memory_mb,
        runtime=RESOURCES.teacher_cache.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=context_cache_settings,
        code=code_digests("stillhouse.studies.context_distillation.teacher"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.context_distillation.teacher {params.inputs:q} output={output:q} "
        "work=work/context_distillation/{wildcards.model}/teacher_cache/{wildcards.cache} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule context_distillation_train:
    """Train one student; its condition decides what is distilled into it."""
    input:
        unpack(context_train_inputs),
    output:
        directory(f"{CONTEXT_RESULTS}/{{model}}/students/{{condition}}/seed_{{seed}}"),
    log:
        "logs/context_distillation/{model}/students/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/context_distillation/{model}/students/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "context_distillation")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=context_train_settings,
        code=code_digests("stillhouse.studies.context_distillation.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.context_distillation.train {params.inputs:q} output={output:q} "
        "work=work/context_distillation/{wildcards.model}/students/{wildcards.condition}/seed_{wildcards.seed} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule context_distillation_evaluate:
    """Score every condition and checkpoint of a model in one engine; only what is new is computed."""
    input:
        model="resources/models/{model}",
        data=CONTEXT_DATA,
        students=CONTEXT_STUDENTS,
        transfer=CONTEXT_TRANSFER,
    output:
        results=f"{CONTEXT_EVALUATION}/results.json",
        item_scores=f"{CONTEXT_EVALUATION}/items.parquet",
        record=f"{CONTEXT_EVALUATION}/run.json",
    log:
        "logs/context_distillation/{model}/evaluation.log",
    benchmark:
        "logs/benchmarks/context_distillation/{model}/evaluation.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=RESOURCES.evaluation.gpus,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=context_evaluate_settings,
        code=code_digests("stillhouse.studies.context_distillation.evaluate"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.context_distillation.evaluate {params.inputs:q} results={output.results:q} item_scores={output.item_scores:q} record={output.record:q} "
        "work=work/context_distillation/{wildcards.model}/evaluation "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule context_distillation_figure:
    """Draw one figure of the study."""
    input:
        unpack(context_figure_inputs),
    output:
        png=report(
            "results/figures/context_distillation/{figure}.png",
            caption="../docs/captions/context_distillation.rst",
            category="Context distillation",
            labels={"figure": "{figure}"},
        ),
        svg="results/figures/context_distillation/{figure}.svg",
    log:
        "logs/context_distillation/figures/{figure}.log",
    benchmark:
        "logs/benchmarks/context_distillation/figures/{figure}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=context_figure_code,
    shell:
        "python -m stillhouse.studies.context_distillation.figures.{wildcards.figure} {params.inputs:q} output={output.png:q} "
        "2>&1 | tee {log:q}"


rule context_distillation_report:
    """Make the study's tables (CSV and LaTeX) and its section of results.md."""
    input:
        results=expand(f"{CONTEXT_EVALUATION}/results.json", model=CONTEXT.models),
        item_scores=expand(f"{CONTEXT_EVALUATION}/items.parquet", model=CONTEXT.models),
    output:
        section="results/context_distillation/section.md",
        tables=directory("results/tables/context_distillation"),
    log:
        "logs/context_distillation/report.log",
    benchmark:
        "logs/benchmarks/context_distillation/report.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.context_distillation.report"),
    shell:
        "python -m stillhouse.studies.context_distillation.report {params.inputs:q} section={output.section:q} tables={output.tables:q} "
        "2>&1 | tee {log:q}"
