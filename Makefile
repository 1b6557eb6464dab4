# make results: everything, from an empty folder to results/results.md. make test: the suite. make check: linters.
# make benchmark: speed, memory and their growth beside the naive forms and other tools; remakes benchmarks/README.md.
# make status: what is done, running, stale and why; starts nothing, and may be asked while a workflow runs.

PYTHON ?= python3.11
VENV ?= .venv
# A machine with an NVIDIA driver gets the GPU environment. What was installed stays: a login node may have no driver.
ENVIRONMENT ?= $(or $(shell cat $(VENV)/installed 2>/dev/null),$(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu))
SNAKEMAKE_ARGUMENTS ?=

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Of 3 GB little is ever imported: Python compiles that when it first is, also where the environment says not to keep it.
export PYTHONDONTWRITEBYTECODE =
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-compile

.PHONY: results status test benchmark check audit warm format generate clean-environment

results: $(VENV)/installed
	snakemake --cores all $(SNAKEMAKE_ARGUMENTS)
	@echo "Done: read results/results.md"

status: $(VENV)/installed
	@python workflow_scripts/status.py $(SNAKEMAKE_ARGUMENTS)

test: $(VENV)/installed-test
	python -m pytest -n 4 $(PYTEST_ARGUMENTS)

benchmark: $(VENV)/installed-test
	python -m benchmarks $(BENCHMARK_ARGUMENTS)

check: $(VENV)/installed-test
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	mypy
	lint-imports
	snakemake --lint

# Known vulnerabilities of what envs/*.txt pin; says so, and passes, where no advisory database can be reached.
audit:
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit==2.10.1; } || \
	  { echo "audit: NOT AUDITED: pip-audit cannot be installed"; rm -rf $(VENV)-audit; }
	@test ! -x $(VENV)-audit/bin/pip-audit || $(VENV)-audit/bin/python .ci/audit envs/*.txt

# Compiles what the tests import, once: in a new environment every worker of `make test` would do that for itself.
warm: $(VENV)/installed-test
	-@python -m pytest --collect-only -qq >/dev/null

format: $(VENV)/installed-test
	ruff check --fix .
	ruff format .
	snakefmt Snakefile rules

# Remake config/config.yaml, its schema and docs/configuration.md from the models in the code.
generate: $(VENV)/installed
	python -m stillhouse.studies.documents

$(VENV)/installed: envs/$(ENVIRONMENT).txt pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned environment envs/$(ENVIRONMENT).txt into $(VENV) (about 3 GB, a few minutes)"
	$(INSTALL) -r envs/$(ENVIRONMENT).txt
	$(INSTALL) --no-build-isolation -e .
	@echo $(ENVIRONMENT) > $@

$(VENV)/installed-test: $(VENV)/installed envs/test.txt envs/cluster.txt
	$(INSTALL) -r envs/test.txt -r envs/cluster.txt
	@touch $@

clean-environment:
	rm -rf $(VENV)
