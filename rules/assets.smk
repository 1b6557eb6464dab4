# Needs: the catalogue. Makes: resources/models/<name>/ and resources/datasets/<name>/, verified and normalised.


def model_settings(wildcards):
    return settings(kind="model", name=wildcards.model, entry=CONFIGURATION.models[wildcards.model])


def dataset_settings(wildcards):
    return settings(kind="dataset", name=wildcards.dataset, entry=CONFIGURATION.datasets[wildcards.dataset])


rule model:
    """Fetch a model from the first source of the catalogue that answers, verify it, and store it as safetensors."""
    output:
        directory("resources/models/{model}"),
    log:
        "logs/assets/model/{model}.log",
    benchmark:
        "logs/benchmarks/assets/model/{model}.jsonl"
    params:
        settings=model_settings,
        code=code_digests("stillhouse.assets.materialise"),
    threads: RESOURCES.assets.threads
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    shell:
        "python -m stillhouse.assets.materialise output={output:q} {params.settings:q} 2>&1 | tee {log:q}"


rule dataset:
    """Fetch a data set, verify it, and store its published splits as JSONL with one schema per task."""
    output:
        directory("resources/datasets/{dataset}"),
    log:
        "logs/assets/dataset/{dataset}.log",
    benchmark:
        "logs/benchmarks/assets/dataset/{dataset}.jsonl"
    params:
        settings=dataset_settings,
        code=code_digests("stillhouse.assets.materialise"),
    threads: 1
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    shell:
        "python -m stillhouse.assets.materialise output={output:q} {params.settings:q} 2>&1 | tee {log:q}"
