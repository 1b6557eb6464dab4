# Needs: each study's section and run records. Makes: results/results.md.


rule results_page:
    """Join the studies' sections, and add what each stage cost and on which hardware."""
    input:
        sections=study_targets("section"),
        records=study_targets("records"),
    output:
        "results/results.md",
    log:
        "logs/results_page.log",
    benchmark:
        "logs/benchmarks/results_page.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        settings=settings(
            gpu_hour_price=RESOURCES.gpu_hour_price, currency=RESOURCES.currency
        ),
        code=code_digests("stillhouse.reporting.results_page"),
    shell:
        "python -m stillhouse.reporting.results_page {params.inputs:q} output={output:q} "
        "{params.settings:q} 2>&1 | tee {log:q}"
