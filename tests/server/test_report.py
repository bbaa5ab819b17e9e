from collections.abc import Sequence

import numpy as np
import pytest

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import pack_batch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Coverage, Layer, Run, Uncovered, World
from gradiometer.server.distributions import NAMES
from gradiometer.server.report import RunReport, report
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

    def read(self, run_id: str, *, columns: Sequence[str] = (), limit: int | None = None) -> list[StepBatch]:
        if run_id == "empty" or columns == NAMES:
            return []
        return [
            batch(0, 1, count=16, variance_trace=8, grad_sq_norm=1, batch_variance=0.5, step_variance=np.nan),
            batch(2, count=16, variance_trace=4, grad_sq_norm=2, batch_variance=0.25),
        ]


def test_parts_are_joined_and_columns_that_a_part_lacks_are_nan() -> None:
    run, _ = report(Shelf())
    assert run.steps.tolist() == [0, 1, 2]
    assert np.isnan(run.columns["step_variance"]).all()
    assert run.columns["maxva_beta"].shape == (3, 2)
    assert run.scalars["loss"].tolist() == [1, 0.5, pytest.approx(1 / 3)]


def test_ratios_are_those_of_sums_over_the_steps() -> None:
    run, _ = report(Shelf())
    assert run.layers("noise_scale") == pytest.approx([5.0, 5.0])
    assert run.model("noise_scale") == pytest.approx(5.0)
    assert run.last(1).model("noise_scale") == 2.0


def test_measured_sums_are_in_the_optimizers_units_where_the_temporal_moments_are_its_own() -> None:
    half = batch(0, batch_variance=4.0, temporal_variance=3.0)
    half.scalars["gradient_scale"] = np.array([0.5]).tobytes()
    assert RunReport.from_batches(status(temporal="collector"), [half]).layers("batch_variance").tolist() == [4, 4]
    own = RunReport.from_batches(status(temporal="optimizer"), [half])
    assert own.layers("batch_variance").tolist() == [2, 2]
    assert own.layers("temporal_variance").tolist() == [3, 3]


def test_a_missing_run_is_named_with_those_there_are() -> None:
    with pytest.raises(PeerFault, match=r"run in \['r', 'empty'\], got run='q'"):
        report(Shelf(), "q")


def test_a_run_of_a_store_without_runs_is_told_that_there_are_none() -> None:
    class Bare(Shelf):
        def list_runs(self) -> list[RunStatus]:
            return []

    assert report(Bare()) == []
    with pytest.raises(PeerFault, match=r"got run='r' of a store that holds no runs yet; attach") as caught:
        report(Bare(), "r")
    assert caught.value.status == "NOT_FOUND"
