# How a study divides its data set.


def split_settings(wildcards):
    """The division that the study's `task` asks for; a data set that the study does not use is refused."""
    task = getattr(CONFIGURATION, known("study", wildcards.study, STUDIES)).task
    known(f"data set of {wildcards.study}", wildcards.dataset, [task.dataset])
    return settings(
        task=CONFIGURATION.datasets[wildcards.dataset].task,
        split_seed=task.split_seed,
        group_by=task.group_by,
        splits={"train": task.train, "validation": task.validation, "test": task.test},
    )
