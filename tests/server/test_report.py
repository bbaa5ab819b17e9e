import io

import numpy as np
import pytest
from rich.console import Console

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import pack_batch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Coverage, Layer, Run, Uncovered, World
from gradiometer.server.report import RunReport, layer_table, noise_scale_text, number, render, report
from gradiometer.stats_core.errors import PeerFault


def status(**fields: object) -> RunStatus:
    run = Run(
        run_id="r",
        layers=[Layer(name="a", num_params=30), Layer(name="b", num_params=10)],
        world=World(framework="torch", framework_version="2"),
        coverage=Coverage(num_params=50, num_params_measured=40, uncovered=[Uncovered(parameter="c", num_params=10)]),
        engine="opacus",
    )
    run.MergeFrom(Run(**fields))  # type: ignore[arg-type]
    return RunStatus(run=run)


def batch(*steps: int, **columns: float) -> StepBatch:
    shape = (len(steps), 2)
    return pack_batch(
        steps, [0] * len(steps), 2, {name: np.full(shape, value) for name, value in columns.items()},
        {"loss": np.array([1.0 / (step + 1) for step in steps])},
    )  # fmt: skip


class Shelf:
    """Two runs, as a store would hold them."""

    def list_runs(self) -> list[RunStatus]:
        return [status(), RunStatus(run=Run(run_id="empty", layers=[Layer(name="x")]))]

    def read(self, run_id: str, *, limit: int | None = None) -> list[StepBatch]:
        if run_id == "empty":
            return []
        return [
            batch(0, 1, count=16, variance_trace=8, grad_sq_norm=1, batch_variance=0.5, step_variance=np.nan),
            batch(2, count=16, variance_trace=4, grad_sq_norm=2, batch_variance=0.25),
        ]


def text_of(run: RunReport, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(run))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_parts_are_joined_and_columns_that_a_part_lacks_are_nan() -> None:
    run, _ = report(Shelf())
    assert run.steps.tolist() == [0, 1, 2]
    assert np.isnan(run.columns["step_variance"]).all()
    assert run.columns["maxva_beta"].shape == (3, 2)
    assert run.scalars["loss"].tolist() == [1, 0.5, pytest.approx(1 / 3)]


def test_ratios_are_those_of_sums_over_the_steps() -> None:
    run, _ = report(Shelf())
    assert run.layers("noise_scale").tolist() == [5.0, 5.0]
    assert run.model("noise_scale") == 5.0
    assert run.last(1).model("noise_scale") == 2.0


def test_measured_sums_are_in_the_optimizers_units_where_the_temporal_moments_are_its_own() -> None:
    half = batch(0, batch_variance=4.0, temporal_variance=3.0)
    half.scalars["gradient_scale"] = np.array([0.5]).tobytes()
    assert RunReport.from_batches(status(temporal="collector"), [half]).layers("batch_variance").tolist() == [4, 4]
    own = RunReport.from_batches(status(temporal="optimizer"), [half])
    assert own.layers("batch_variance").tolist() == [2, 2]
    assert own.layers("temporal_variance").tolist() == [3, 3]


def test_the_report_says_what_was_measured_and_what_was_not() -> None:
    run, _ = report(Shelf())
    said = text_of(run)
    assert "40 of 50 parameters (80.0%); not: c" in said
    assert "3 measured, 0 to 2" in said
    assert "SNR 3.2: a batch of 16 carries more signal than noise (noise scale 5 examples)." in said


def test_a_run_without_steps_has_a_report_too() -> None:
    _, empty = report(Shelf())
    assert "empty" in text_of(empty)


def test_examples_that_are_not_finite_and_dropped_steps_are_said() -> None:
    broken = batch(0, 1, nonfinite_examples=2)
    broken.scalars["dropped_steps"] = np.array([0.0, 3.0]).tobytes()
    said = text_of(RunReport.from_batches(status(), [broken]))
    assert "4 examples had a NaN or an infinity" in said
    assert "3 measured steps never reached the server" in said


def test_a_missing_run_is_named_with_those_there_are() -> None:
    with pytest.raises(PeerFault, match=r"run in \['r', 'empty'\], got run='q'"):
        report(Shelf(), "q")


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "–"), (0.0, "0"), (1.234567, "1.23"), (1.2e-7, "1.2e-7"), (12345.6, "12,346"), (-3.5e9, "-3.5e9")],
)
def test_numbers_read_well_and_a_missing_one_is_never_zero(value: float, text: str) -> None:
    assert number(value) == text


def test_a_noise_scale_at_or_below_zero_is_not_resolved() -> None:
    assert noise_scale_text(-4.0) == noise_scale_text(0.0) == "unresolved"
    assert noise_scale_text(12.0) == "12"


def test_no_number_is_cut_at_eighty_columns() -> None:
    long = status()
    long.run.layers[0].name = "encoder.blocks.11.attention.output.dense"
    values = dict.fromkeys(("batch_variance", "step_variance", "temporal_variance", "variance_trace"), 1.2345e-7)
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


def test_a_run_of_a_store_without_runs_is_told_that_there_are_none() -> None:
    class Bare(Shelf):
        def list_runs(self) -> list[RunStatus]:
            return []

    assert report(Bare()) == []
    with pytest.raises(PeerFault, match=r"got run='r' of a store that holds no runs yet; attach") as caught:
        report(Bare(), "r")
    assert caught.value.status == "NOT_FOUND"
