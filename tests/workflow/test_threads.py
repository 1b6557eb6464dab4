"""A rule that computes takes its threads: two torch jobs of two threads each on two cores get in each other's way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.workflow import rule_texts

from stillhouse.config.resources import JobResources
from stillhouse.runtime.code_digests import import_closure, module_path

COMPUTING = {"torch", "transformers", "peft", "vllm", "torchao"}
# They reach torch and compute little with it (files are read, converted, tokenised), or one column after another.
TAKES_THREADS = re.compile(r'RESOURCES\.\w+\.threads|threads_of_one\(RESOURCES\.\w+, "\w+"\)')
ONE_THREAD = {
    "dataset",
    "consistency_lens_tokens",
    "lora_generation_collect",
    "quantized_distillation_calibrate",
    "quantized_distillation_export",
}


def computes(module: str) -> bool:
    """Whether the module, or a module of the package that it imports, imports a library that computes."""
    for member in import_closure(module):
        path = module_path(member)
        for node in ast.walk(ast.parse(path.read_text())) if path else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if COMPUTING & {name.partition(".")[0] for name in names}:
                return True
    return False


def test_every_rule_that_computes_takes_the_threads_of_the_resources() -> None:
    computing = set()
    for name, text in rule_texts().items():
        modules = re.findall(r'code_digests\(\s*"([\w.]+)"', text)
        if any(computes(module) for module in modules):
            computing.add(name)
            threads = re.search(r"^ +threads: (.+)$", text, re.MULTILINE)
            taken = threads is not None and TAKES_THREADS.fullmatch(threads[1]) is not None
            assert taken != (name in ONE_THREAD), f"rule {name}: threads {threads and threads[1]}"
    assert {"context_distillation_train", "consistency_lens_evaluate"} <= computing


@pytest.mark.parametrize(
    ("jobs", "processors", "machine_mb", "threads"),
    [
        pytest.param(1, 2, 24_000, 2, id="alone"),
        pytest.param(6, 2, 24_000, 1, id="many"),
        pytest.param(0, 2, 24_000, 2, id="none"),
        pytest.param(6, 64, 512_000, 2, id="room for all"),
        pytest.param(16, 16, 32_000, 4, id="little memory"),
        pytest.param(6, 2, 4_000, 2, id="memory for less than one"),
    ],
)
def test_jobs_without_gpus_fill_the_processors_and_never_the_memory(
    jobs: int, processors: int, machine_mb: int, threads: int
) -> None:
    request = JobResources(threads=2, memory_mb=8000)
    assert request.threads_of_one(jobs, processors, machine_mb) == threads
    assert processors // threads * request.memory_mb <= machine_mb or threads == processors


@pytest.mark.slow
def test_a_job_s_threads_reach_the_libraries(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(
        'rule two:\n    output: "threads"\n    threads: 2\n    shell: "echo $OMP_NUM_THREADS > {output}"\n'
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "4", "--quiet", "all"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "threads").read_text() == "2\n"
