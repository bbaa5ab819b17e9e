from pathlib import Path

from gradiometer.stats_core import catalog
from gradiometer.stats_core.glossary import glossary

PAGE = Path(__file__).parents[2] / "docs/glossary.md"


def test_the_page_in_the_docs_is_what_the_catalogue_says() -> None:
    assert PAGE.read_text() == glossary(), "run make docs"


def test_every_name_has_its_row() -> None:
    for row in (*catalog.STATISTICS, *catalog.SCALARS):
        assert f"| `{row.name}` |" in glossary()
