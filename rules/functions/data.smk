# How a study divides its data sets.


def study_divisions(study):
    """A study's data sets and their division, by name: that of its `task`, or of each of its tasks."""
    section = getattr(CONFIGURATION, known("study", study, STUDIES))
    tasks = section.divided if hasattr(section, "divided") else [section.task]
    return {task.dataset: task for task in tasks}


def split_settings(wildcards):
    """The division that the study asks for; a data set that the study does not use is refused."""
    divisions = study_divisions(wildcards.study)
    known(f"data set of {wildcards.study}", wildcards.dataset, divisions)
    task = divisions[wildcards.dataset]
    return settings(
        task=CONFIGURATION.datasets[wildcards.dataset].task,
        split_seed=task.split_seed,
        group_by=task.group_by,
        splits={"train": task.train, "validation": task.validation, "test": task.test},
    )
