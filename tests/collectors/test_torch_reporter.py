"""From a PyTorch model to the wire, through the real publisher."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gradiometer as gm
from gradiometer.protos.columns import column_arrays, scalar_arrays
from tests.fake_ingest import IngestServer
from tests.reference import loop_layer
from tests.torch_models import case, example_grads, squared, train
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")


def test_numbers_on_the_wire_are_those_of_the_loop() -> None:
    model = MLP.make(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wanted = []
    with IngestServer() as server:
        with gm.attach(model, optimizer, run="wire", endpoint=server.endpoint) as collector:
            for step in range(3):
                x, y = MLP.draw(5, torch.float64, seed=step)
                wanted.append(example_grads(MLP, model, x, y))
                optimizer.zero_grad()
                loss = MLP.losses(model(x), y).mean()
                loss.backward()
                optimizer.step()
                collector.log(loss=loss)
            collector.event("note", "the end")
        run = server.runs["wire"]
        (batches,) = server.stored.values()
    steps = {}
    for batch in batches:
        columns, scalars = column_arrays(batch), scalar_arrays(batch)
        for index, step in enumerate(batch.steps):
            steps[step] = {name: values[index] for name, values in {**columns, **scalars}.items()}
    assert sorted(steps) == [0, 1, 2]
    assert [event.text for batch in batches for event in batch.events] == ["the end"]
    assert run.coverage.num_params == run.coverage.num_params_measured
    for step, grads in enumerate(wanted):
        for number, layer in enumerate(run.layers):
            for name, value in loop_layer([grads[parameter] for parameter in layer.parameters]).items():
                assert steps[step][name][number] == pytest.approx(value, rel=1e-5)
        assert steps[step]["loss"] > 0


def test_training_goes_on_where_no_server_answers() -> None:
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = MLP.draw(5)
    started = time.monotonic()
    with gm.attach(model, optimizer, endpoint="127.0.0.1:9"):
        for _ in range(3):
            MLP.losses(model(x), y).mean().backward()
            optimizer.step()
    assert time.monotonic() - started < 10


def test_the_last_step_is_sent_also_where_the_script_ends_without_detaching(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        import torch
        import gradiometer as gm

        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        collector = gm.attach(model, optimizer, run="no-detach", endpoint=sys.argv[1])
        for _ in range(3):
            model(torch.randn(4, 3)).square().sum(1).mean().backward()
            optimizer.step()
    """)
    environment = {**os.environ, "GRADIOMETER_SPOOL": str(tmp_path / "spool")}
    with IngestServer() as server:
        subprocess.run([sys.executable, "-c", script, server.endpoint], check=True, env=environment, timeout=120)
        (batches,) = server.stored.values()
    assert [step for batch in batches for step in batch.steps] == [0, 1, 2]


def test_what_is_logged_belongs_to_the_open_step_or_else_to_the_one_that_closed_last(
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.attach(model, optimizer, every=2) as collector:
        for step in range(4):
            x, y = MLP.draw(4, seed=step)
            loss = squared(model(x), y).mean()
            collector.log(loss=loss, early=step)
            loss.backward()
            optimizer.step()
            collector.log(tokens=10 * step, late=torch.tensor(step + 0.5), text="no number", many=torch.ones(3))
    assert [(recorder.scalars[step]["early"], recorder.scalars[step]["late"]) for step in (0, 2)] == [
        (0, 0.5),
        (2, 2.5),
    ]
    assert recorder.scalars[2]["tokens"] == 20
    assert recorder.scalars[2]["loss"] > 0
    assert not {"text", "many"} & set(recorder.scalars[2])
    assert sum("got text=<str>" in record.message for record in caplog.records) == 1


def test_a_number_that_can_not_be_published_is_dropped_alone_and_said_once(
    recorder: Recorder,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.attach(model, optimizer) as collector:
        for step in range(3):
            x, y = MLP.draw(4, seed=step)
            squared(model(x), y).mean().backward()
            collector.log(loss_scale="none", **{"val loss": 1.0, "fine": 2.0})
            collector.log(loss=10**400, sizes=np.ones(2))
            assert collector.moments["0.weight"].count == 4 * (step + 1)
            if step == 2:
                optimizer.step()
        assert not collector._is_off
    assert {"loss", "sizes", "loss_scale", "val loss"}.isdisjoint(recorder.scalars[0])
    assert recorder.scalars[0]["fine"] == 2
    for part in ("got loss=<int>", "got sizes=<ndarray>", "got loss_scale=<str>", "got scalar='val loss'; rename it"):
        assert sum(part in record.message for record in caplog.records) == 1


def test_where_nothing_is_published_no_numbers_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradiometer.collectors import torch_measure

    def never(*_args, **_kwargs):
        raise AssertionError("nobody reads these")

    monkeypatch.setattr(torch_measure, "batch_sums", never)
    monkeypatch.setenv("GRADIOMETER_ENDPOINT", "off")
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.attach(model, optimizer) as collector:
        train(model, optimizer, 2)
        assert collector.moments
        assert not collector._is_off
