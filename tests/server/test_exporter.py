import math
import re

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gradiometer.protos.columns import pack_batch
from gradiometer.server.exporter import ExportSettings, metric_names, register_exporter
from gradiometer.server.live import Live
from gradiometer.stats_core import catalog
from tests.webserver import make_batch, make_run


class Clock:
    now = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now


def exported(live: Live, settings: ExportSettings | None = None, registry: CollectorRegistry | None = None) -> dict:
    """Name → label values → number, as Prometheus's own parser reads it."""
    if registry is None:
        registry = CollectorRegistry()
        register_exporter(live, registry, settings)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        family.name: {tuple(sample.labels.items()): sample.value for sample in family.samples} for family in families
    }


def live_with(layers: int = 3, run_id: str = "a", **run: str) -> Live:
    live = Live()
    live.register(make_run(run_id, layers=layers, **run))
    live.append(run_id, make_batch([0, 1, 2], layers=layers))
    return live


def labelled(samples: dict, label: str) -> set[str]:
    return {value for labels in samples for name, value in labels if name == label}


def test_every_exported_name_comes_from_the_catalogue_and_every_name_is_exported():
    live = live_with()
    scalars = {row.name: 1.0 for row in catalog.SCALARS if row.metric}
    live.append("a", make_batch([3, 4, 5], statistics="full", **scalars))
    names = exported(live)
    assert set(names) == set(metric_names())
    metrics = {row.metric for row in (*catalog.STATISTICS, *catalog.SCALARS)}
    rest = {re.sub(r"^gradiometer_(run|layers?)_", "", name) for name in names} - metrics
    assert rest == {
        "info",
        "step",
        "steps_received",
        "examples_per_second",
        "coverage_ratio",
        "last_data_timestamp_seconds",
        "noise_scale_resolved",
        "noise_scale_low_examples",
        "noise_scale_high_examples",
        "batch_snr_low_ratio",
        "batch_snr_high_ratio",
        "variance_low_ratio",
        "variance_high_ratio",
        "gradiometer_exposition_dropped_series",
    }


def test_no_two_sources_share_a_name():
    metrics = [row.metric for row in (*catalog.STATISTICS, *catalog.SCALARS) if row.metric]
    assert len(set(metrics)) == len(metrics)


def test_the_help_is_the_catalogues():
    assert metric_names()["gradiometer_layer_variance_ratio"].startswith(catalog.statistic("variance_ratio").help)


def test_the_numbers_are_those_of_the_window():
    live = live_with()
    found = exported(live)
    view = live.view("a")
    values = found["gradiometer_layer_batch_variance"]
    assert values[(("layer", "blocks.1"), ("run", "a"))] == view.layers("batch_variance")[1]
    assert found["gradiometer_run_noise_scale_examples"][(("run", "a"),)] == view.model("noise_scale")
    assert found["gradiometer_run_step"][(("run", "a"),)] == 2
    assert found["gradiometer_run_loss"][(("run", "a"),)] == 2.5
    assert found["gradiometer_run_coverage_ratio"][(("run", "a"),)] == 60 / 65


def test_step_and_rank_are_never_labels():
    allowed = {
        "gradiometer_run_info": None,
        "gradiometer_layer_": {"run", "layer"},
        "gradiometer_layers_": {"run", "q"},
    }
    for name, samples in exported(live_with()).items():
        labels = {label for sample in samples for label, _ in sample}
        wanted = next((value for start, value in allowed.items() if name.startswith(start)), {"run"})
        assert wanted is None or labels <= wanted, name


def test_quantiles_over_layers_run_from_the_least_to_the_largest():
    live = live_with(layers=21)
    values = np.sort(live.view("a").layers("batch_variance"))
    found = exported(live)["gradiometer_layers_batch_variance"]
    assert {dict(labels)["q"]: value for labels, value in found.items()} == {
        "0": values[0],
        "0.25": values[5],
        "0.5": values[10],
        "0.75": values[15],
        "1": values[20],
    }


def batch_with(**columns: list[float]):
    layers = len(next(iter(columns.values())))
    given = {name: np.array([values]) for name, values in columns.items()}
    return pack_batch([0], [0], layers, given, {})


def test_what_does_not_exist_is_left_out_and_never_zero():
    live = Live()
    live.register(make_run("a", layers=2))
    live.append("a", batch_with(variance_trace=[1.0, float("nan")], grad_sq_norm=[float("inf"), 1.0]))
    found = exported(live)
    assert labelled(found["gradiometer_layer_variance_trace"], "layer") == {"blocks.0"}
    assert "gradiometer_layer_noise_scale_examples" not in found
    assert "gradiometer_run_variance_ratio" not in found
    assert not [name for name, samples in found.items() if any(not math.isfinite(value) for value in samples.values())]


def test_a_noise_scale_that_is_not_resolved_has_no_number_and_ranks_as_the_largest():
    live = Live()
    live.register(make_run("a", layers=3))
    live.append("a", batch_with(variance_trace=[1.0, 1.0, 1.0], grad_sq_norm=[-0.1, 0.5, 0.25]))
    found = exported(live)
    assert labelled(found["gradiometer_layer_noise_scale_examples"], "layer") == {"blocks.1", "blocks.2"}
    quantiles = {dict(labels)["q"]: value for labels, value in found["gradiometer_layers_noise_scale_examples"].items()}
    assert quantiles["0.5"] == 4.0
    assert "1" not in quantiles


INTERVALS = {
    "noise_scale": "noise_scale{}_examples",
    "batch_snr": "batch_snr{}_ratio",
    "variance_ratio": "variance{}_ratio",
}


@pytest.mark.parametrize("name", INTERVALS)
def test_a_statistic_with_an_interval_has_its_two_ends_beside_it(name: str):
    live = Live()
    live.register(make_run("a", layers=3))
    live.append("a", make_batch(range(8)))
    view, found = live.view("a"), exported(live)
    model, layers = view.model_interval(name), view.layers_interval(name)
    for end in ("low", "high"):
        metric = INTERVALS[name].format("_" + end)
        assert found[f"gradiometer_run_{metric}"] == {(("run", "a"),): getattr(model, end)}
        for index in range(3):
            labels = (("layer", f"blocks.{index}"), ("run", "a"))
            assert found[f"gradiometer_layer_{metric}"][labels] == pytest.approx(getattr(layers, end)[index])
        assert f"gradiometer_layers_{metric}" not in found
    assert model.low < view.model(name) < model.high


def test_an_interval_that_does_not_exist_is_left_out():
    found = exported(live_with())  # three steps
    assert "gradiometer_run_batch_snr_ratio" in found
    assert not [name for name in found if "_low" in name or "_high" in name or name.endswith("resolved")]


def test_a_noise_scale_whose_interval_has_no_upper_end_is_told_so():
    live = Live()
    live.register(make_run("a", layers=2))
    steps = range(6)
    signal = np.array([[1.0, value] for value in (0.1, -0.1, 0.2, 0.1, -0.2, 0.1)])
    columns = {"variance_trace": np.ones((6, 2)), "grad_sq_norm": signal}
    live.append("a", pack_batch(steps, [0] * 6, 2, columns, {}))
    found = exported(live)
    assert found["gradiometer_run_noise_scale_resolved"] == {(("run", "a"),): 1.0}
    assert labelled(found["gradiometer_layer_noise_scale_high_examples"], "layer") == {"blocks.0"}
    assert labelled(found["gradiometer_layer_noise_scale_low_examples"], "layer") == {"blocks.0", "blocks.1"}
    columns["grad_sq_norm"] = signal[:, ::-1] * [[1.0, 1e-9]]
    live.append("a", pack_batch(steps, [1] * 6, 2, columns, {}))
    found = exported(live)
    assert found["gradiometer_run_noise_scale_resolved"] == {(("run", "a"),): 0.0}
    assert "gradiometer_run_noise_scale_high_examples" not in found
    assert found["gradiometer_run_noise_scale_low_examples"] == {
        (("run", "a"),): live.view("a").model_interval("noise_scale").low
    }


def noisy(snr: list[float], nonfinite: list[float] | None = None):
    return batch_with(
        grad_sq_norm=snr, batch_variance=[1.0] * len(snr), nonfinite_examples=nonfinite or [0.0] * len(snr)
    )


def test_a_small_model_exports_all_layers_and_a_large_one_its_noisiest():
    live = Live()
    live.register(make_run("a", layers=10))
    live.append("a", noisy(list(range(10))))
    assert len(labelled(exported(live)["gradiometer_layer_batch_snr_ratio"], "layer")) == 10
    settings = ExportSettings(all_layers_up_to=9, top_layers=3)
    found = exported(live, settings)["gradiometer_layer_batch_snr_ratio"]
    assert labelled(found, "layer") == {"blocks.0", "blocks.1", "blocks.2"}
    everything = ExportSettings(all_layers_up_to=9, top_layers=3, all_layers=True)
    assert len(labelled(exported(live, everything)["gradiometer_layer_batch_snr_ratio"], "layer")) == 10


def test_layers_with_examples_that_are_not_finite_come_first():
    live = Live()
    live.register(make_run("a", layers=10))
    live.append("a", noisy(list(range(10)), [0.0] * 9 + [1.0]))
    found = exported(live, ExportSettings(all_layers_up_to=0, top_layers=2))["gradiometer_layer_batch_snr_ratio"]
    assert labelled(found, "layer") == {"blocks.0", "blocks.9"}


def test_the_choice_of_layers_does_not_flicker():
    registry = CollectorRegistry()
    live = Live(window_steps=1)
    live.register(make_run("a", layers=10))
    register_exporter(live, registry, ExportSettings(all_layers_up_to=0, top_layers=3))

    def chosen(snr: list[float], nonfinite: list[float] | None = None) -> set[str]:
        live.append("a", noisy(snr, nonfinite))
        found = exported(live, registry=registry)["gradiometer_layer_batch_snr_ratio"]
        return {name.removeprefix("blocks.") for name in labelled(found, "layer")}

    assert chosen([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) == {"0", "1", "2"}
    assert chosen([0, 1, 3, 2, 4, 5, 6, 7, 8, 9]) == {"0", "1", "2"}  # a place lost is not enough
    assert chosen([0, 1, 9, 2, 3, 4, 5, 6, 7, 8]) == {"0", "1", "3"}  # the last place is
    assert chosen([0, 1, 9, 2, 3, 4, 5, 6, 7, 8], [0] * 9 + [2]) == {"0", "1", "9"}  # a broken layer enters at once


def test_series_beyond_the_limit_are_dropped_and_counted():
    view = live_with(layers=10).view("a")
    measured = [row for row in catalog.STATISTICS if row.metric and view.is_measured(row.name)]
    statistics = sum(1 + 2 * row.interval for row in measured)
    assert len(measured) < sum(row.metric is not None for row in catalog.STATISTICS)
    found = exported(live_with(layers=10), ExportSettings(max_series=4 * statistics + 1))
    assert len(labelled(found["gradiometer_layer_batch_snr_ratio"], "layer")) == 4
    assert found["gradiometer_exposition_dropped_series"] == {(): 6 * statistics}


def test_a_silent_run_is_not_exported_any_more():
    clock = Clock()
    live = Live(clock=clock)
    live.register(make_run("a", started_unix_nanos=0))
    live.append("a", make_batch([0]))
    registry = CollectorRegistry()
    register_exporter(live, registry, ExportSettings(linger_seconds=60))
    clock.now += 59
    assert "gradiometer_run_step" in exported(live, registry=registry)
    clock.now += 2
    assert set(exported(live, registry=registry)) == {"gradiometer_exposition_dropped_series"}


def test_registering_collects_nothing():
    registry = CollectorRegistry()
    live = Live()
    live.runs = None  # type: ignore[assignment,method-assign]
    register_exporter(live, registry)


def test_a_setting_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"needs max_series of at least 0, got max_series=-1; 0 exports none"):
        ExportSettings(max_series=-1)
