#!/usr/bin/env bash
# Fills the conda environment as `make` fills .venv; snakemake runs it in the workflow's folder.
set -euo pipefail
list=envs/cpu.txt
command -v nvidia-smi >/dev/null && list=envs/gpu.txt
python -m pip install --no-deps -r "$list"
python -m pip install --no-deps --no-build-isolation -e .
