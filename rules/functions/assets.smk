# The catalogue's entries as the settings of the asset rules.


def model_settings(wildcards):
    name = known("model", wildcards.model, CONFIGURATION.models)
    return settings(
        kind="model", name=name, entry=CONFIGURATION.models[name].materialise_settings()
    )


def dataset_settings(wildcards):
    name = known("data set", wildcards.dataset, CONFIGURATION.datasets)
    return settings(
        kind="dataset",
        name=name,
        entry=CONFIGURATION.datasets[name].materialise_settings(),
    )
