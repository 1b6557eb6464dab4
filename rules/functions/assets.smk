# The catalogue's entries as the settings of the asset rules.


def catalogue_entry(what, name, entries):
    """The entry of that name; one that no source can yield is refused while the DAG is built."""
    entry = entries[known(what, name, entries)]
    if entry.objection():
        raise WorkflowError(f"{what} '{name}': {entry.objection()}")
    return entry


# Files of this machine are inputs, so that an edit is noticed; other sources are pinned by the catalogue. An unknown name
# has none: an error here would let Snakemake take an old folder of that name, the settings below name what is wrong.


def own_model_files(wildcards):
    entry = CONFIGURATION.models.get(wildcards.model)
    return entry.own_files(["*"]) if entry else []


def own_dataset_files(wildcards):
    entry = CONFIGURATION.datasets.get(wildcards.dataset)
    return entry.own_files(entry.splits.values()) if entry else []


def model_settings(wildcards):
    entry = catalogue_entry("model", wildcards.model, CONFIGURATION.models)
    return settings(
        kind="model", name=wildcards.model, entry=entry.materialise_settings()
    )


def dataset_settings(wildcards):
    entry = catalogue_entry("data set", wildcards.dataset, CONFIGURATION.datasets)
    return settings(
        kind="dataset", name=wildcards.dataset, entry=entry.materialise_settings()
    )
