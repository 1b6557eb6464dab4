# Needs: the catalogue. Makes: resources/models/<name>/ and resources/datasets/<name>/, verified and normalised.


def model_settings(wildcards):
    name = known("model", wildcards.model, CONFIGURATION.models)
    return settings(kind="model", name=name, entry=CONFIGURATION.models[name].materialise_settings())


def dataset_settings(wildcards):
    name = known("data set", wildcards.dataset, CONFIGURATION.datasets)
    return settings(kind="dataset", name=name, entry=CONFIGURATION.datasets[name].materialise_settings())


rule model:
    """Fetch a model from the first source of the catalogue that answers, verify it, and store it as safetensors."""
    output:
        directory("resources/models/{model}"),
    log:
        "logs/assets/model/{model}.log",
    benchmark:
        "logs/benchmarks/assets/model/{model}.jsonl"
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
    output:
        directory("resources/datasets/{dataset}"),
    log:
        "logs/assets/dataset/{dataset}.log",
    benchmark:
        "logs/benchmarks/assets/dataset/{dataset}.jsonl"
    threads: 1
    resources:
        mem_mb=RESOURCES.assets.memory_mb,
        runtime=RESOURCES.assets.runtime_minutes,
    params:
        settings=dataset_settings,
        code=code_digests("stillhouse.assets.materialise"),
    shell:
        "python -m stillhouse.assets.materialise output={output:q} {params.settings:q} 2>&1 | tee {log:q}"
