# Needs: the catalogue, and the files of this machine that it names.
# Makes: resources/models/<name>/ and resources/datasets/<name>/, verified and normalised.


include: "functions/assets.smk"


rule model:
    """Fetch a model from the first source of the catalogue that answers, verify it, and store it as safetensors."""
    input:
        own_files=own_model_files,
    output:
        directory("resources/models/{model}"),
    log:
        "logs/assets/model/{model}.log",
    benchmark:
        "logs/benchmarks/assets/model/{model}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: RESOURCES.assets.threads
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    params:
        settings=model_settings,
        code=code_digests("stillhouse.assets.materialise"),
    shell:
        "python -m stillhouse.assets.materialise output={output:q} {params.settings:q} 2>&1 | tee {log:q}"


rule dataset:
    """Fetch a data set, verify it, and store its published splits as JSONL with one schema per task."""
    input:
        own_files=own_dataset_files,
    output:
        directory("resources/datasets/{dataset}"),
    log:
        "logs/assets/dataset/{dataset}.log",
    benchmark:
        "logs/benchmarks/assets/dataset/{dataset}.jsonl"
    conda:
        "../envs/stillhouse.yaml"
    threads: 1
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    params:
        settings=dataset_settings,
        code=code_digests("stillhouse.assets.materialise"),
    shell:
        "python -m stillhouse.assets.materialise output={output:q} {params.settings:q} 2>&1 | tee {log:q}"
