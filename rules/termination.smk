# SIGTERM, by which Slurm announces a job's end, finds a step alive to the last: it saves what it has, and ends; a
# job whose work is not done asks to be started again.

import os
import sys

from stillhouse.runtime.scheduler import REQUEUE_VARIABLE
from stillhouse.runtime.termination import hand_on_termination

# The shell around a step waits for it, and what writes its log goes on until the step says nothing more: where each
# process of a job is told, these would end at once, and Slurm kills what is left of a job whose shell has ended.
shell.prefix(
    "set -euo pipefail; trap : TERM; tee() {{ trap '' TERM; exec tee \"$@\"; }}; "
)

# Where only the first process is told, Snakemake is that in a job's step. One process further up it waits for srun, which
# would end the step by force.
if workflow.remote_exec and "slurm-jobstep" not in sys.argv:
    os.environ[REQUEUE_VARIABLE] = "1"
    hand_on_termination()
