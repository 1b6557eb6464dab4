# Needs: resources/datasets. Makes: results/<study>/data/<dataset>/, the train, validation and test splits of a study.


include: "functions/data.smk"


rule split_dataset:
    """Divide a study's data set into train, validation and test by seed."""
    input:
        dataset="resources/datasets/{dataset}",
    output:
        directory("results/{study}/data/{dataset}"),
    log:
        "logs/{study}/split/{dataset}.log",
    benchmark:
        "logs/benchmarks/{study}/split/{dataset}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        inputs=named_inputs,
        settings=split_settings,
        code=code_digests("stillhouse.data.split"),
    shell:
        "python -m stillhouse.data.split {params.inputs:q} output={output:q} "
        "{params.settings:q} 2>&1 | tee {log:q}"
