# Needs: resources/models, resources/datasets, envs/llmcompressor.txt. Makes: results/quantized_distillation/, its figures and
# its tables, and for calibrated baselines resources/environments/llmcompressor.


include: "functions/quantized_distillation.smk"


rule llmcompressor_environment:
    """Build the environment of the calibrated baselines: what differs from ours, over ours."""
    input:
        requirements=local("envs/llmcompressor.txt"),  # a source, which travels with the job
    output:
        directory(LLMCOMPRESSOR),
    log:
        "logs/environments/llmcompressor.log",
    benchmark:
        "logs/benchmarks/environments/llmcompressor.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.assets.environment"),
    shell:
        "python -m stillhouse.assets.environment {params.inputs:q} output={output:q} "
        "2>&1 | tee {log:q}"


rule quantized_distillation_teacher_cache:
    """Compute the teacher's final hidden states on the data set's answers once, for every run that shares them."""
    input:
        unpack(quant_cache_inputs),
    output:
        directory(f"{QUANT_RESULTS}/{{model}}/teacher_cache/{{cache}}"),
    log:
        "logs/quantized_distillation/{model}/teacher_cache/{cache}.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/{model}/teacher_cache/{cache}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.teacher_cache, "quantized_distillation")
    resources:
        gpu=1,
        mem_mb=RESOURCES.teacher_cache.memory_mb,
        runtime=RESOURCES.teacher_cache.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=quant_cache_settings,
        code=code_digests("stillhouse.studies.quantized_distillation.teacher"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.quantized_distillation.teacher {params.inputs:q} output={output:q} "
        "work=work/quantized_distillation/{wildcards.model}/teacher_cache/{wildcards.cache} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule quantized_distillation_train:
    """Train one 4-bit student."""
    input:
        unpack(quant_train_inputs),
    output:
        directory(f"{QUANT_RESULTS}/{{model}}/students/{{condition}}/seed_{{seed}}"),
    log:
        "logs/quantized_distillation/{model}/students/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/{model}/students/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: threads_of_one(RESOURCES.training, "quantized_distillation")
    resources:
        gpu=RESOURCES.training.gpus,
        mem_mb=RESOURCES.training.memory_mb,
        runtime=RESOURCES.training.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=quant_train_settings,
        code=code_digests("stillhouse.studies.quantized_distillation.train"),
    shell:
        f"{LEASE} --at-most --distributed {{resources.gpu}} -- "
        "python -m stillhouse.studies.quantized_distillation.train {params.inputs:q} output={output:q} "
        "work=work/quantized_distillation/{wildcards.model}/students/{wildcards.condition}/seed_{wildcards.seed} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule quantized_distillation_export:
    """Merge a student's adapter and convert its weights; without a student, round the base to nearest. Needs no GPU."""
    input:
        unpack(quant_export_inputs),
    output:
        directory(f"{QUANT_RESULTS}/{{model}}/exported/{{condition}}/seed_{{seed}}"),
    log:
        "logs/quantized_distillation/{model}/exported/{condition}/seed_{seed}.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/{model}/exported/{condition}/seed_{seed}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=quant_export_settings,
        code=code_digests("stillhouse.studies.quantized_distillation.export"),
    shell:
        "CUDA_VISIBLE_DEVICES= python -m stillhouse.studies.quantized_distillation.export {params.inputs:q} output={output:q} "
        "{params.settings:q} 2>&1 | tee {log:q}"


ruleorder: quantized_distillation_calibrate > quantized_distillation_export


rule quantized_distillation_calibrate:
    """Round the base with GPTQ or AWQ on calibration data, with llmcompressor's packages.

    One column comes after another: a second thread costs more than it gives.
    """
    input:
        unpack(quant_calibrate_inputs),
    output:
        # In the pattern itself: a storage provider's path loses what stands under wildcard_constraints.
        directory(f"{QUANT_RESULTS}/{{model}}/exported/{{condition,gptq|awq}}/seed_0"),
    log:
        "logs/quantized_distillation/{model}/exported/{condition}/seed_0.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/{model}/exported/{condition}/seed_0.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=quant_calibrate_settings,
        code=code_digests("stillhouse.studies.quantized_distillation.baselines"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "env PYTHONPATH={input.environment:q}${{PYTHONPATH:+:$PYTHONPATH}} python -m stillhouse.studies.quantized_distillation.baselines {params.inputs:q} output={output:q} "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule quantized_distillation_evaluate:
    """Score the teacher, the baselines and every student of a model; only what is new is computed."""
    input:
        unpack(quant_evaluate_inputs),
    output:
        results=f"{QUANT_EVALUATION}/results.json",
        item_scores=f"{QUANT_EVALUATION}/items.parquet",
        record=f"{QUANT_EVALUATION}/run.json",
    log:
        "logs/quantized_distillation/{model}/evaluation.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/{model}/evaluation.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.evaluation.threads
    resources:
        gpu=RESOURCES.evaluation.gpus,
        mem_mb=RESOURCES.evaluation.memory_mb,
        runtime=RESOURCES.evaluation.runtime_minutes,
    params:
        inputs=named_inputs,
        settings=quant_evaluate_settings,
        code=code_digests("stillhouse.studies.quantized_distillation.evaluate"),
    shell:
        f"{LEASE} --at-most {{resources.gpu}} -- "
        "python -m stillhouse.studies.quantized_distillation.evaluate {params.inputs:q} results={output.results:q} item_scores={output.item_scores:q} record={output.record:q} "
        "work=work/quantized_distillation/{wildcards.model}/evaluation "
        "{params.settings:q} 2>&1 | tee {log:q}"


rule quantized_distillation_figure:
    """Draw one figure of the study."""
    input:
        unpack(quant_figure_inputs),
    output:
        png=report(
            "results/figures/quantized_distillation/{figure}.png",
            caption="../docs/captions/quantized_distillation.rst",
            category="Quantised distillation",
            labels={"figure": "{figure}"},
        ),
        svg="results/figures/quantized_distillation/{figure}.svg",
    log:
        "logs/quantized_distillation/figures/{figure}.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/figures/{figure}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=quant_figure_code,
    shell:
        "python -m stillhouse.studies.quantized_distillation.figures.{wildcards.figure} {params.inputs:q} output={output.png:q} "
        "2>&1 | tee {log:q}"


rule quantized_distillation_report:
    """Make the study's tables (CSV and LaTeX) and its section of results.md."""
    input:
        results=expand(f"{QUANT_EVALUATION}/results.json", model=QUANT.models),
        item_scores=expand(f"{QUANT_EVALUATION}/items.parquet", model=QUANT.models),
    output:
        section=f"{QUANT_RESULTS}/section.md",
        tables=directory("results/tables/quantized_distillation"),
    log:
        "logs/quantized_distillation/report.log",
    benchmark:
        "logs/benchmarks/quantized_distillation/report.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        code=code_digests("stillhouse.studies.quantized_distillation.report"),
    shell:
        "python -m stillhouse.studies.quantized_distillation.report {params.inputs:q} section={output.section:q} tables={output.tables:q} "
        "2>&1 | tee {log:q}"
