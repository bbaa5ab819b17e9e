"""The examples run as they are, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_the_example_runs(path: Path, tmp_path: Path) -> None:
    settings = {"PYTHONPATH": str(ROOT / "src"), "GRADIOMETER_ENDPOINT": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:gradiometer", path],
        cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "variance" in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves files behind"
