"""Every test has a spool of its own: none may find what another, or the user, has left."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def spool_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    monkeypatch.setenv("GRADIOMETER_SPOOL", str(folder))
    return folder
