"""Every benchmark, in the order of the page, and what is missing from it with the reason."""

from __future__ import annotations

from benchmarks.activation_extraction import EXTRACTION
from benchmarks.consistency_lens import DECODERS
from benchmarks.context_distillation import STEP, STUDY
from benchmarks.evaluation import CHECKPOINTS
from benchmarks.fake_quantization import FAKE_QUANTISATION
from benchmarks.gkd_step import OFF_POLICY, ON_POLICY
from benchmarks.harness import Benchmark
from benchmarks.latentwire import CACHED_STEP
from benchmarks.lora_generation import DELTA_GRADIENTS, DELTAS, TEACHER_BATCH
from benchmarks.packing import INVARIANCE
from benchmarks.teacher_cache import FIXED_SHOTS
from benchmarks.weighed import WEIGHED

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        STEP,
        STUDY,
        FIXED_SHOTS,
        OFF_POLICY,
        ON_POLICY,
        FAKE_QUANTISATION,
        *DECODERS,
        EXTRACTION,
        CACHED_STEP,
        DELTAS,
        DELTA_GRADIENTS,
        TEACHER_BATCH,
        CHECKPOINTS,
        INVARIANCE,
    )
}
MEASURED = {**BENCHMARKS, **WEIGHED}
# A choice is weighed again where it is named, `python -m benchmarks only=[compiled_lens]`: compiling takes minutes.
ON_REQUEST = frozenset(WEIGHED)
# Rows and tools that the page names as missing.
MISSING = {
    "ms-swift (GKD with `teacher_prompt`)": "4.6.0 asks for peft < 0.21, trl < 1.0 and datasets < 4.8.5 where 0.21.2, "
    "1.16.0 and 5.2.0 are pinned; beside the pins pip falls back to 1.3.0, which has no GKD. Its form, an adapter-off "
    "teacher whose top K is computed in each step, runs on this package's own code instead. In an environment of its "
    "own pip resolves 4.6.0 (peft 0.20.0, trl 0.29.1, datasets 4.8.4, torch 2.13.0): that comparison is open",
}
