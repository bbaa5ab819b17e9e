import re

import pytest

from gradiometer.stats_core import catalog, selection
from gradiometer.stats_core.derived import FORMULAS
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.rows import INGREDIENTS

WIRE = {row.name for row in catalog.WIRE}
SCALARS = {row.name for row in catalog.SCALARS}


def test_names_are_unique_and_symbols_units_and_formulas_are_given() -> None:
    names = [row.name for row in catalog.STATISTICS]
    assert len(set(names)) == len(names)
    for row in catalog.STATISTICS:
        assert row.symbol
        assert row.unit
        assert row.formula
        assert not row.help.endswith(".")


def test_a_scalar_shares_its_name_only_with_what_it_is_the_whole_models_value_of() -> None:
    assert len(SCALARS) == len(catalog.SCALARS)
    shared = SCALARS & {row.name for row in catalog.STATISTICS}
    assert shared == {row.name for row in catalog.STATISTICS if row.kind == "example"}


def test_what_travels_needs_ingredients_and_what_is_derived_needs_columns_or_scalars() -> None:
    for row in catalog.STATISTICS:
        if row.travels:
            assert set(row.needs) <= set(INGREDIENTS), row.name
        else:
            assert set(row.columns) <= WIRE | SCALARS, row.name
            assert set(row.columns) & WIRE, row.name
    assert set(Moments._fields) <= set(INGREDIENTS)


def test_every_ratio_has_two_terms_and_every_formula_its_function() -> None:
    assert all(len(row.needs) == 2 for row in catalog.STATISTICS if row.kind == "ratio")
    assert set(FORMULAS) == {row.name for row in catalog.STATISTICS if row.kind == "formula"}


def test_what_is_derived_is_of_no_cheaper_tier_than_what_it_is_made_of() -> None:
    for row in catalog.STATISTICS:
        if not row.travels:
            assert row.tier is not None
            assert set(row.columns) & WIRE <= set(selection.columns(row.tier)), row.name


def test_metric_names_keep_prometheus_rules() -> None:
    metrics = [row.metric for row in (*catalog.STATISTICS, *catalog.SCALARS) if row.metric]
    assert len(set(metrics)) == len(metrics)
    for metric in metrics:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric)
        assert not metric.endswith(("_count", "_sum", "_total", "_bucket"))
        assert "milliseconds" not in metric


def test_the_power_is_that_of_the_unit() -> None:
    powers = {row.name: row.power for row in catalog.STATISTICS}
    assert (powers["variance_trace"], powers["norm_max"], powers["noise_scale"]) == (2, 1, 0)
    assert (powers["inverse_root"], powers["inverse_root_sq"]) == (-1, -2)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'noise_scale'.*got name='loss'.*see docs/glossary\.md"):
        catalog.statistic("loss")
