"""A folder of packages over ours: what runs with it sees its packages first, and ours after them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stillhouse.assets.environment import EnvironmentStep, main
from stillhouse.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, source: str) -> Path:
    """A package of one module."""
    path = folder / f"{name}-9.9-py3-none-any.whl"
    files = {
        f"{name}.py": source,
        f"{name}-9.9.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n",
        f"{name}-9.9.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{name}-9.9.dist-info/RECORD", "".join(f"{file},,\n" for file in files))
    return path


def test_its_own_packages_stand_before_ours(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    # `yaml` is a package of ours: here another one takes its place, for this environment alone.
    requirements.write_text(f"{wheel(tmp_path, 'yaml', 'WHOSE = 9')}\n{wheel(tmp_path, 'only_there', 'X = 1')}\n")
    main(EnvironmentStep(requirements=requirements, output=tmp_path / "environment"))
    script = "import numpy, only_there, yaml; print(yaml.WHOSE, only_there.X, numpy.__version__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "environment")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    import numpy as np
    import yaml

    assert done.stdout.split() == ["9", "1", np.__version__]
    assert hasattr(yaml, "safe_load") and not hasattr(yaml, "WHOSE")


def test_a_package_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{tmp_path / 'missing-1.0-py3-none-any.whl'}\n")
    with pytest.raises(UserError, match=r"pip.*missing-1\.0.*run again"):
        main(EnvironmentStep(requirements=requirements, output=tmp_path / "environment"))
    assert not (tmp_path / "environment").exists()


@pytest.mark.parametrize("package", ["llmcompressor", "ms-swift"])
def test_the_pins_leave_ours_as_they_are(package: str) -> None:
    ours = {line.split("==")[0] for line in (ROOT / "envs/cpu.txt").read_text().splitlines() if "==" in line}
    listed = (ROOT / f"envs/{package.replace('-', '_')}.txt").read_text().splitlines()
    pins = [line for line in listed if not line.startswith("#")]
    names = {pin.split("==")[0] for pin in pins}
    assert all(pin.count("==") == 1 for pin in pins) and package in names
    assert not names & {"torch", "transformers", "numpy"} and {"torch", "transformers"} <= ours
    assert sys.version_info >= (3, 11)
