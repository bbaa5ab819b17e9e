"""The documentation speaks of what there is: settings, commands, files, and the code in the README runs."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradiometer.cli import app
from gradiometer.server.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_of_the_server_is_documented() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    for name in Settings.model_fields:
        assert f"`{name}`" in text, name
        assert f"`GRADIOMETER_{name.upper()}`" in text, name


def test_every_command_is_in_the_readme_and_has_help() -> None:
    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"gradiometer {name}" in text, name
        done = CliRunner().invoke(app, [name, "--help"])
        assert done.exit_code == 0
        assert done.output.strip()


def test_both_commands_of_a_newcomer_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    for target in re.findall(r"`([a-z_]+/[a-z_/.*]+\.(?:py|proto|md))`", page.read_text()):
        places = [ROOT, ROOT / "src/gradiometer"]
        assert any(list(place.glob(target)) for place in places), target


def test_the_readmes_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIOMETER_ENDPOINT", "off")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {"__name__": "readme"}  # read from top to bottom, as a person does
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
