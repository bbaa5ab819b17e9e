import io
from collections.abc import Sequence

import numpy as np
import pytest
from rich.console import Console

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import pack_batch
from gradiometer.protos.distributions import pack_examples, pack_histograms
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Layer, Run
from gradiometer.server.distributions import NAMES
from gradiometer.server.report import RunReport, report
from gradiometer.server.report_text import layer_table, noise_scale_text, number, render
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import sketch_rows
from tests.server.test_report import Shelf, batch, status


def text_of(run: RunReport, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(run))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_says_what_was_measured_and_what_was_not() -> None:
    run, _ = report(Shelf())
    said = text_of(run)
    assert "40 of 50 parameters (80.0%); not: c" in said
    assert "3 measured, 0 to 2" in said
    assert "SNR 3.2: a batch of 16 carries more signal than noise (noise scale 5 examples)." in said


def test_examples_that_are_all_equal_have_a_report_too() -> None:
    said = text_of(RunReport.from_batches(status(), [batch(0, 1, batch_variance=0.0, temporal_variance=1.0)]))
    assert "MaxVA's s is" not in said


def test_a_run_without_steps_has_a_report_too() -> None:
    _, empty = report(Shelf())
    assert "empty" in text_of(empty)


def test_examples_that_are_not_finite_and_dropped_steps_are_said() -> None:
    broken = batch(0, 1, nonfinite_examples=2)
    broken.scalars["dropped_steps"] = np.array([0.0, 3.0]).tobytes()
    said = text_of(RunReport.from_batches(status(), [broken]))
    assert "4 examples had a NaN or an infinity" in said
    assert "3 measured steps never reached the server" in said


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "–"), (0.0, "0"), (1.234567, "1.23"), (1.2e-7, "1.2e-7"), (12345.6, "12,346"), (-3.5e9, "-3.5e9")],
)
def test_numbers_read_well_and_a_missing_one_is_never_zero(value: float, text: str) -> None:
    assert number(value) == text


def test_a_noise_scale_at_or_below_zero_is_not_resolved() -> None:
    assert noise_scale_text(-4.0) == noise_scale_text(0.0) == "unresolved"
    assert noise_scale_text(12.0) == "12"


def sentences(said: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(said.split())


def told(steps: int, **columns: object) -> str:
    shape = (steps, 2)
    arrays = {name: np.broadcast_to(np.asarray(values, float), shape) for name, values in columns.items()}
    return text_of(RunReport.from_batches(status(), [pack_batch(range(steps), [0] * steps, 2, arrays, {})]))


def wiggle(middle: float, by: float, steps: int = 8) -> np.ndarray:
    """Steps that go up and down around a number."""
    return middle + by * np.resize([1.0, -1.0], steps)[:, None]


def test_numbers_are_told_with_their_intervals() -> None:
    said = told(8, count=16, variance_trace=8, batch_variance=0.5, grad_sq_norm=wiggle(1, 0.1))
    assert "SNR 2 (95 %: 1.82 to 2.18): a batch of 16 carries more signal than noise" in sentences(said)
    assert "(noise scale 8 examples, 95 %: 7.34 to 8.79)" in sentences(said)


def test_a_signal_that_may_be_as_large_as_the_noise_is_said_to_be_about_that() -> None:
    said = told(8, count=16, variance_trace=8, batch_variance=1, grad_sq_norm=wiggle(1, 0.1))
    assert "a batch of 16 carries about as much signal as noise" in sentences(said)


def test_a_signal_whose_interval_holds_0_can_not_be_told_from_noise() -> None:
    said = told(8, count=16, variance_trace=8, batch_variance=0.5, grad_sq_norm=wiggle(0.1, 1))
    assert "in a batch of 16 the gradient can't be told from noise" in sentences(said)
    assert "unresolved" in said
    few = told(2, count=16, variance_trace=8, batch_variance=0.5, grad_sq_norm=0.1)
    assert "unresolved" not in few


@pytest.mark.parametrize(
    ("by", "meaning"),
    [
        (0.5, "the step-to-step variance is what the drawn examples explain"),
        (0.01, "the gradient moves more from step to step than the drawn examples explain"),
    ],
)
def test_rho_says_what_its_interval_lets_it_say(by: float, meaning: str) -> None:
    said = told(9, step_variance=wiggle(1.08, by, 9), step_variance_expected=1.0)
    assert f"): {meaning}." in sentences(said)
    assert "ρ 1." in said


def test_what_elements_and_examples_say_has_a_table_of_its_own() -> None:
    columns = {"active_elements": 1000, "significant_elements": [135, 50], "gsnr_sum": 20, "norm_p99": 7.5}
    said = told(4, **columns)
    assert "what elements and examples say, over the last 4 measured steps" in said
    (layer,) = [line for line in said.splitlines() if line.startswith("a ") and "13.5 %" in line]
    assert layer.split() == ["a", "13.5", "%", "0.02", "–", "–", "–", "7.5"]
    assert "The mean of 9.2% of the elements differs from 0 at the 5 % level; of pure noise 5 % would." in sentences(
        said
    )
    assert "what elements and examples say" not in told(4, batch_variance=1)


def test_examples_norms_are_the_whole_models_own() -> None:
    one = batch(0, count=16, effective_examples=3, norm_median=1, norm_max=2)
    for name, value in {"effective_examples": 9.0, "norm_median": 0.5, "norm_max": 4.0}.items():
        one.scalars[name] = np.array([value]).tobytes()
    said = text_of(RunReport.from_batches(status(), [one]))
    assert "Squared norms are spread as over 9 of 16 examples; norms: median 0.5, largest 4." in sentences(said)


def test_distributions_and_single_examples_are_told_where_there_are_some() -> None:
    class Full(Shelf):
        def read(self, run_id: str, *, columns: Sequence[str] = (), limit: int | None = None) -> list[StepBatch]:
            if run_id == "empty" or columns != NAMES:
                return super().read(run_id, columns=columns, limit=limit)
            assert limit == 2
            rng = np.random.default_rng(0)
            found = StepBatch(steps=[1, 2], num_layers=2)
            for index in range(2):
                rows = rng.pareto(2.0, (2, 500)) + 1
                found.histograms.extend(pack_histograms("example_norm", sketch_rows(rows), index))
                found.histograms.extend(pack_histograms("element_deviation_ratio", sketch_rows(rows), index))
            found.examples.extend(pack_examples(Outliers(np.array([4]), np.array([9.0])), 1, dict.fromkeys([4], "[x]")))
            return [found]

    run, empty = report(Full(), window=2)
    said = text_of(run)
    (layer,) = [line for line in said.splitlines() if line.startswith("a ") and "±" in line]
    p50, p90, p99, alpha = layer.split()[1:5]
    # A Pareto distribution of index 2 has its quantiles at (1 - q)^(-1/2).
    assert [float(p50), float(p90), float(p99)] == pytest.approx([2**0.5, 10**0.5, 10], rel=0.25)
    assert float(alpha) == pytest.approx(2, abs=0.8)  # four standard errors, 2/√100
    (model,) = [line for line in said.splitlines() if line.startswith("whole model") and line.rstrip().endswith("–")][
        -1:
    ]
    assert float(model.split()[2]) == pytest.approx(2**0.5, rel=0.1)
    assert "the largest gradients of single examples" in said
    (largest,) = [line for line in said.splitlines() if line.startswith("[x]")]
    assert largest.split() == ["[x]", "2", "3"]
    assert "distributions" not in text_of(empty)


def test_gradients_of_extreme_scale_are_reported_as_they_are() -> None:
    columns = {"batch_variance": np.full((4, 2), 3.0), "variance_trace": np.full((4, 2), 48.0)}
    columns["grad_sq_norm"] = np.full((4, 2), 6.0)
    one = pack_batch(range(4), [0] * 4, 2, columns, {"unit_exponent": np.full(4, 66.0)})
    run = RunReport.from_batches(status(), [one])
    assert run.layers("batch_variance") == pytest.approx([3 * 2.0**132] * 2)
    assert run.model("noise_scale") == pytest.approx(8.0)
    assert run.model("batch_snr") == pytest.approx(2.0)
    assert "1.6e40" in text_of(run)


def test_no_number_is_cut_at_eighty_columns() -> None:
    long = status()
    long.run.layers[0].name = "encoder.blocks.11.attention.output.dense"
    values = dict.fromkeys(("batch_variance", "step_variance", "temporal_variance", "variance_trace"), 1.2345e-7)
    values |= dict.fromkeys(("norm_median", "norm_p99", "gsnr_sum", "consecutive_dot", "effective_examples"), 1.2345e-7)
    run = RunReport.from_batches(long, [batch(0, 1, grad_sq_norm=-1e-19, **values)])
    console = Console(file=io.StringIO(), width=80)
    console.print(layer_table(run))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(
        line.startswith("…") and "1.2e-7" in line and "-8.1e-13" in line and line.rstrip().endswith("unresolved")
        for line in lines
    )
    assert max(map(len, lines)) <= 80


def test_a_large_model_shows_its_noisiest_layers() -> None:
    layers = [Layer(name=f"layer{i}", num_params=1) for i in range(60)]
    columns = {"batch_variance": np.arange(60.0)[None]}
    big = RunReport.from_batches(
        RunStatus(run=Run(run_id="big", layers=layers)), [pack_batch([0], [0], 60, columns, {})]
    )
    table = layer_table(big, most=5)
    shown = list(table.columns[0].cells)
    assert shown[:5] == ["layer59", "layer58", "layer57", "layer56", "layer55"]
    assert table.caption == "5 of 60 layers, those of the largest variance"
