# The catalogue's entries as the settings of the asset rules.


def catalogue_entry(what, name, entries):
    """The entry of that name; one that no source can yield is refused while the DAG is built."""
    entry = entries[known(what, name, entries)]
    if entry.objection():
        raise WorkflowError(f"{what} '{name}': {entry.objection()}")
    return entry


def own_model_files(wildcards):
    """A model of this machine is read anew when one of its files changes; others are pinned by the catalogue."""
    return catalogue_entry("model", wildcards.model, CONFIGURATION.models).own_files(
        ["*"]
    )


def own_dataset_files(wildcards):
    entry = catalogue_entry("data set", wildcards.dataset, CONFIGURATION.datasets)
    return entry.own_files(entry.splits.values())


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
