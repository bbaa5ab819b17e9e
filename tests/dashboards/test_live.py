"""The page's files, as far as they can be judged without a browser; tests/system/test_page.py opens one."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import gradiometer.dashboards
from gradiometer.server.page import SHOWN
from gradiometer.server.view import COMPARED

FOLDER = Path(gradiometer.dashboards.__file__).parent / "live"
OURS = sorted(path for path in FOLDER.iterdir() if not path.name.startswith("uplot"))


class Seen(HTMLParser):
    """Elements with their attributes, and text inside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._within = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_data(self, data):
        if self._within in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def html() -> Seen:
    seen = Seen()
    seen.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    return seen


def test_nothing_is_inline_so_that_the_policy_can_forbid_it(html):
    assert html.inline == []
    attributes = [name for _, attributes in html.elements for name in attributes]
    assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_every_file_that_the_page_asks_for_is_there(html):
    asked = {
        attributes.get("src") or attributes.get("href")
        for tag, attributes in html.elements
        if tag in ("script", "link", "img")
    }
    names = {str(name).removeprefix("/static/") for name in asked}
    for path in FOLDER.glob("*.js"):
        names |= set(re.findall(r'^import .* from "\./([^"]+)";$', path.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name in names if not (FOLDER / name).is_file()} == set()
    assert {path.name for path in FOLDER.iterdir()} - names == {"index.html", "uplot.LICENSE"}


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere(path):
    found = set(re.findall(r"https?://[^\s\"'<>)]+", path.read_text(encoding="utf-8")))
    assert found <= {"http://www.w3.org/2000/svg"}  # a name, not an address


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_text_of_a_run_never_becomes_markup(path):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", path.read_text())


def test_every_id_that_the_scripts_ask_for_is_in_the_page(html):
    there = {attributes["id"] for _, attributes in html.elements if "id" in attributes}
    asked = set(re.findall(r'\bat\("([^"]+)"\)', (FOLDER / "live.js").read_text(encoding="utf-8")))
    assert asked - there == set()


def test_every_statistic_that_the_page_shows_is_one_that_it_is_told(html):
    text = (FOLDER / "table.js").read_text(encoding="utf-8")
    headings = set(re.findall(r"^  (\w+): ", text.split("const HEADINGS = {")[1].split("};")[0], re.MULTILINE))
    assert headings | {"nonfinite_examples"} == {*COMPARED, *SHOWN}
    explained = {attributes.get("data-statistic") for _, attributes in html.elements} - {None}
    assert explained <= {*COMPARED, *SHOWN}


def test_the_vendored_library_is_the_one_its_name_says_and_its_licence_is_kept():
    assert "uPlot (v1.6.32)" in (FOLDER / "uplot-1.6.32.min.js").read_text(encoding="utf-8")[:200]
    assert "MIT License" in (FOLDER / "uplot.LICENSE").read_text(encoding="utf-8")


def test_the_page_names_its_language_and_its_regions(html):
    assert next(attributes for tag, attributes in html.elements if tag == "html")["lang"] == "en"
    assert {"status", "alert", "tooltip"} <= {attributes.get("role") for _, attributes in html.elements}
    regions = [attributes for tag, attributes in html.elements if tag == "nav" or attributes.get("role") == "region"]
    assert regions
    assert all({"aria-label", "aria-labelledby"} & set(attributes) for attributes in regions)
