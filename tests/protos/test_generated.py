"""The committed generated code is what the ``.proto`` files say, by the pinned generators."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.system
def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "proto", f"OUT={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    fresh = {p.name: p.read_text() for p in (tmp_path / "gradiometer/protos").iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "protos").iterdir() if "_pb2" in p.name}
    assert fresh == committed


def test_every_field_says_its_meaning() -> None:
    for path in (ROOT / "protos").glob("*.proto"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if " = " in line and line.rstrip().endswith(";") and not line.startswith("syntax"):
                assert lines[number - 1].strip().startswith("//"), f"{path.name}:{number + 1}: {line.strip()}"


def test_buf_finds_nothing_to_complain_about() -> None:
    buf = shutil.which("buf", path=str(ROOT / ".venv/bin")) or shutil.which("buf")
    assert buf, "tests.protos needs buf, got none; run make setup"
    subprocess.run([buf, "lint"], cwd=ROOT, check=True)


def test_nothing_released_is_broken() -> None:
    buf = shutil.which("buf", path=str(ROOT / ".venv/bin")) or shutil.which("buf")
    assert buf
    released = ROOT / "protos/released.binpb"
    subprocess.run([buf, "breaking", "--against", str(released)], cwd=ROOT, check=True)


def test_a_planted_break_would_be_found(tmp_path: Path) -> None:
    buf = shutil.which("buf", path=str(ROOT / ".venv/bin")) or shutil.which("buf")
    assert buf
    protos = tmp_path / "src/gradiometer/protos"
    protos.mkdir(parents=True)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    for path in (ROOT / "protos").glob("*.proto"):
        text = path.read_text().replace("uint64 sequence = 1", "uint32 sequence = 1")
        (protos / path.name).write_text(text)
    found = subprocess.run(
        [buf, "breaking", "--against", str(ROOT / "protos/released.binpb")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 100
    assert "uint32" in found.stdout
