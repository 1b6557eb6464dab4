"""The finished workflow that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.workflow import Workflow, make_workflow


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workflow:
    """A workflow that has run to its end."""
    workflow = make_workflow(tmp_path_factory.mktemp("workflow") / "project", tiny_model)
    workflow.run()
    return workflow
