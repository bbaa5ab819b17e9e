import pytest

from gradiometer.stats_core import catalog
from gradiometer.stats_core.selection import columns, ingredients, selected, sketches, spelled


def test_tiers_grow_and_full_holds_all_but_what_must_be_named() -> None:
    assert set(columns("light")) < set(columns("default")) < set(columns("full"))
    assert columns("full") == tuple(row.name for row in catalog.WIRE)
    assert selected("full") == {row.name for row in catalog.STATISTICS if row.travels} - {"outliers"}


def test_light_needs_no_memory_and_neither_directions_nor_signs() -> None:
    assert ingredients("light") <= {"count", "weight_sum", "weight_sq_sum", "mean", "m2", "sq_norms", "weights"}
    assert {"previous", "temporal"} <= ingredients("default")
    assert not {"dots", "sign_mean", "fixed", "kish", "adam"} & ingredients("default")
    assert {"dots", "sign_mean", "fixed", "kish", "adam"} <= ingredients("full")


def test_a_derived_name_asks_for_what_it_is_made_of_and_for_no_more() -> None:
    assert columns(["inner_product_test"]) == ("count", "effective_count", "mean_sq_norm", "parallel_variance")
    assert ingredients(["inner_product_test"]) == {
        "count", "weight_sum", "weight_sq_sum", "mean", "dots",
    }  # fmt: skip
    assert columns(["cabs_batch"]) == ("count", "effective_count", "variance_trace")


def test_tiers_and_names_go_together_in_any_spelling() -> None:
    assert spelled(["light", " outliers", "light"]) == "light,outliers"
    assert columns("light,conflicting_share") == columns(("conflicting_share", "light"))
    assert "outliers" in selected(["light", "outliers"])
    assert sketches(["default", "example_norm"]) == ("example_norm",)
    assert spelled(spelled(["default", "gsnr"])) == "default,gsnr"


@pytest.mark.parametrize("wrong", ["", "heavy", ["default", "gsnrr"], [], ["named"], [3]])
def test_what_is_neither_a_tier_nor_a_statistic_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"'light', 'default', 'full'.*see docs/glossary\.md"):
        columns(wrong)  # type: ignore[arg-type]
