# What every rules file uses: the validated configuration, params that track settings and code, the launch of steps.

import gc
import os
import shutil
from pathlib import Path

from pydantic_core import to_jsonable_python
from snakemake.exceptions import WorkflowError

from stillhouse.config.layering import nearest
from stillhouse.runtime.code_digests import code_digests
from stillhouse.runtime.commands import dotted_arguments, path_arguments
from stillhouse.runtime.errors import ConfigurationError
from stillhouse.studies.configuration import STUDIES, load_configuration

# Jobs live as long as the DAG: searching them for garbage every 700 objects takes a sixth of a large dry run.
gc.freeze()
gc.set_threshold(200_000)


def configuration():
    """The validated configuration; a fault in it ends the workflow with one line, before any work starts."""
    given = workflow.config_settings.configfiles
    default = [path for path in workflow.configfiles if path not in given]
    try:
        return load_configuration(
            config,
            [Path(path) for path in (*default, *given)],
            workflow.config_settings.config,
        )
    except ConfigurationError as error:
        raise WorkflowError(f"configuration: {error}") from None


CONFIGURATION = configuration()
RESOURCES = CONFIGURATION.resources
# The jobs run here, where no GPU is on which they could get in each other's way: processors and memory alone limit them.
# Snakemake does not know its executor yet; only where jobs are submitted does it count them (`--jobs`).
ON_PROCESSORS_ALONE = (
    workflow.is_main_process
    and workflow.resource_settings.nodes is None
    and shutil.which("nvidia-smi") is None
    and not os.environ.get("STILLHOUSE_FAKE_GPUS")
)
if ON_PROCESSORS_ALONE:
    workflow.register_resource("gpu", 1000)


def threads_of_one(request, study):
    """The threads of one of the study's trainings, or of what one waits for; without GPUs they run side by side."""
    if not ON_PROCESSORS_ALONE:
        return request.threads
    machine_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    trainings = len(globals()[f"{study.upper()}_TARGETS"]["students"])
    # What starts no job (`--unlock`, `--dag`, `--report`) is not told of cores.
    cores = workflow.resource_settings.cores or os.cpu_count()
    return request.threads_of_one(trainings, cores, machine_mb)


def known(what, name, valid):
    """`name` itself; a name that is not among the `valid` ones is refused with the nearest."""
    if name not in valid:
        raise WorkflowError(
            f"unknown {what} '{name}': {nearest(name, list(valid), f'{what}s')}"
        )
    return name


def settings(**leaves):
    """The settings that a step reads, as sorted `key=value` strings: its command line, and what makes it stale."""
    return dotted_arguments(to_jsonable_python(leaves))


def named_inputs(wildcards, input):
    """The rule's inputs as `name=path` arguments of its step; lists become `name=[path,path]`."""
    return [
        argument
        for name in input.keys()
        for argument in path_arguments(name, _plain(input.get(name)))
    ]


def _plain(paths):
    return str(paths) if isinstance(paths, str) else [str(path) for path in paths]


def study_targets(kind):
    """The named targets of every study that is switched on; each study's rules file defines `<STUDY>_TARGETS`."""
    return [
        path
        for study in CONFIGURATION.studies
        for path in globals()[f"{study.upper()}_TARGETS"][kind]
    ]


# A step that may use GPUs runs under the lease, which hands out devices and starts accelerate where there are several.
LEASE = "python workflow_scripts/gpu_lease.py"
