"""Every benchmark, in the order of the page, and which of them run on request alone."""

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
from benchmarks.ms_swift import MS_SWIFT
from benchmarks.packing import INVARIANCE
from benchmarks.teacher_cache import FIXED_SHOTS
from benchmarks.weighed import WEIGHED

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        STEP,
        STUDY,
        MS_SWIFT,
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
# Measured where they are named, `python -m benchmarks only=[compiled_lens]`: compiling takes minutes, and ms-swift
# another environment.
ON_REQUEST = frozenset({*WEIGHED, MS_SWIFT.name})
