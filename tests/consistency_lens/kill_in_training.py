"""Program: the training step, killed in the middle of an update, to play a crash.

python -m tests.consistency_lens.kill_in_training UPDATE key=value ...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from stillhouse.runtime.commands import run_step
from stillhouse.studies.consistency_lens import train
from stillhouse.studies.consistency_lens.objective import LensObjective

if __name__ == "__main__":
    update = int(sys.argv.pop(1))
    compute = LensObjective.__call__

    def compute_or_die(self: LensObjective, model: Any, micro_batch: Any, step: int) -> Any:
        if step == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, model, micro_batch, step)

    LensObjective.__call__ = compute_or_die  # type: ignore[method-assign]
    run_step(train.TrainStep, train.main)
