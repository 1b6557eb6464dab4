"""A rule that computes takes its threads: two torch jobs of two threads each on two cores get in each other's way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.workflow import rule_texts

from stillhouse.runtime.code_digests import import_closure, module_path

COMPUTING = {"torch", "transformers", "peft", "vllm", "torchao"}
# They reach torch and compute little with it: files are read, converted, tokenised.
ONE_THREAD = {"dataset", "consistency_lens_tokens", "lora_generation_collect", "quantized_distillation_export"}


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
            taken = threads is not None and re.fullmatch(r"RESOURCES\.\w+\.threads|threads_of_one\(RESOURCES\.\w+\)", threads[1]) is not None
            assert taken != (name in ONE_THREAD), f"rule {name}: threads {threads and threads[1]}"
    assert {"context_distillation_train", "consistency_lens_evaluate"} <= computing


@pytest.mark.slow
def test_a_job_s_threads_reach_the_libraries(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(
        'rule two:\n    output: "threads"\n    threads: 2\n    shell: "echo $OMP_NUM_THREADS > {output}"\n'
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "4", "--quiet", "all"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "threads").read_text() == "2\n"
