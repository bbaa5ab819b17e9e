import re

import pytest

from gradiometer.stats_core import catalog, selection
from gradiometer.stats_core.moments import Moments


def test_names_are_unique_and_symbols_units_and_formulas_are_given() -> None:
    names = [row.name for row in catalog.STATISTICS] + [row.name for row in catalog.SCALARS]
    assert len(set(names)) == len(names)
    for row in catalog.STATISTICS:
        assert row.symbol
        assert row.unit
        assert row.formula
        assert not row.help.endswith(".")


def test_every_row_needs_what_exists() -> None:
    travelling = {row.name: row for row in catalog.WIRE}
    for row in catalog.STATISTICS:
        if row.kind == "ratio":
            assert len(row.needs) == 2
            assert set(row.needs) <= set(travelling)
        else:
            assert set(row.needs) <= set(Moments._fields)


def test_a_ratio_needs_no_dearer_tier_than_its_own() -> None:
    for row in catalog.RATIOS:
        assert set(row.needs) <= set(selection.columns(row.tier))


def test_metric_names_keep_prometheus_rules() -> None:
    metrics = [row.metric for row in (*catalog.STATISTICS, *catalog.SCALARS) if row.metric]
    for metric in metrics:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric)
        assert not metric.endswith(("_count", "_sum", "_total", "_bucket"))
        assert "milliseconds" not in metric


def test_tiers_grow() -> None:
    assert selection.columns("default")[: len(selection.columns("light"))] == selection.columns("light")
    assert set(selection.columns("default")) <= set(selection.columns("full"))


def test_an_unknown_name_or_tier_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'light', 'default', 'full'.*got tier='all'"):
        selection.columns("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"see docs/glossary\.md"):
        catalog.statistic("loss")
