"""What the tests of this folder share: the finished workflow, and the GPU lease as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from support.workflow import REPOSITORY, Workflow, make_workflow


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow that has run to its end."""
    workflow = make_workflow(tmp_path_factory.mktemp("workflow") / "project", tiny_model)
    workflow.run()
    return workflow


@pytest.fixture
def lease_module(monkeypatch: pytest.MonkeyPatch):
    """The lease program as a module."""
    specification = importlib.util.spec_from_file_location("gpu_lease", REPOSITORY / "workflow_scripts/gpu_lease.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_lease", module)
    specification.loader.exec_module(module)
    return module
