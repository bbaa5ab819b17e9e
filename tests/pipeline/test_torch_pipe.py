"""PyTorch, through the whole pipe: model, collector, gRPC, journal, query; against the float64 loop."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gradiometer as gm
from gradiometer.demo.torch_gpt import ByteGPT
from gradiometer.optimizers.torch_api import MAdam
from gradiometer.protos.columns import column_arrays
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import RunReport, report
from tests.reference import LoopMoments, loop_layer, loop_moments
from tests.server_process import eventually, running_server

BATCH, TIME = 5, 12


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).reshape(-1, 256), rows[:, 1:].reshape(-1))


def loop_grads(model: torch.nn.Module, rows: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """Gradients of each row alone, in float64."""
    model = copy.deepcopy(model).double()
    found: dict[str, list[np.ndarray]] = {name: [] for name, _ in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        loss_of(model, row[None]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name].append(parameter.grad.numpy().copy())
    return found


@pytest.mark.parametrize("with_moments", [True, False], ids=["per_example", "minibatch"])
def test_what_the_store_holds_is_what_the_float64_loop_finds(tmp_path: Path, with_moments: bool) -> None:
    torch.manual_seed(0)
    model = ByteGPT(width=16, heads=2, depth=1, context=TIME)
    optimizer = MAdam(model.parameters(), lr=1e-3, variance="per_example" if with_moments else "minibatch")
    truth: list[dict[str, list[np.ndarray]]] = []
    with running_server(tmp_path / "data") as server, RemoteStore(server.grpc) as store:
        with gm.attach(model, optimizer, run="recorded", endpoint=server.grpc) as collector:
            assert collector.coverage.num_params_measured == collector.coverage.num_params
            for _ in range(3):
                rows = torch.randint(256, (BATCH, TIME + 1))
                truth.append(loop_grads(model, rows))
                optimizer.zero_grad()
                loss = loss_of(model, rows)
                loss.backward()
                collector.log(loss=loss)
                optimizer.step()
        eventually(lambda: [s.stored_steps for s in store.list_runs()] == [3])
        (run,) = report(store, "recorded")
    assert run.steps.tolist() == [0, 1, 2]
    assert np.isfinite(run.scalars["loss"]).all()
    check_layers(run, truth)
    if not with_moments:
        return
    # MaxVA's own columns: with one first step behind it, s is the examples' variance of the mean.
    first = run.columns["temporal_variance"][0]
    np.testing.assert_allclose(first, run.columns["batch_variance"][0] * run.scalars["gradient_scale"][0], rtol=1e-4)


def check_layers(run: RunReport, truth: list[dict[str, list[np.ndarray]]]) -> None:
    """Every light column and the step-to-step pair of every layer and step."""
    assert len(run.status.run.layers) > 5
    previous: dict[str, list[LoopMoments]] = {}
    for index, grads in enumerate(truth):
        for column, layer in enumerate(run.status.run.layers):
            parts = [grads[name] for name in layer.parameters]
            want = loop_layer(parts)
            moments = [loop_moments(part) for part in parts]
            for name, value in want.items():
                got = float(run.columns[name][index, column])
                # Norms to 1e-5; what is made of m2 to 1e-5 of the squared norms, as promised.
                assert got == pytest.approx(value, rel=2e-5, abs=2e-5 * want["sq_norm_mean"]), (layer.name, name)
            assert run.columns["nonfinite_examples"][index, column] == 0
            if index:
                before = previous[layer.name]
                step = sum(0.5 * float(((a.mean - b.mean) ** 2).sum()) for a, b in zip(moments, before, strict=True))
                assert float(run.columns["step_variance"][index, column]) == pytest.approx(step, rel=1e-4)
            else:
                assert np.isnan(run.columns["step_variance"][index, column])
            previous[layer.name] = moments


def test_nan_gradients_are_stored_counted_and_shown(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with running_server(tmp_path / "data") as server, RemoteStore(server.grpc) as store:
        with gm.attach(model, optimizer, run="poisoned", endpoint=server.grpc):
            for poison in (0.0, float("nan"), 0.0):
                x = torch.ones(6, 3)
                x[2, 1] += poison
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        eventually(lambda: [s.stored_steps for s in store.list_runs()] == [3])
        (batch,) = store.read("poisoned", first_step=1, last_step=1)
        columns = column_arrays(batch)
    assert columns["nonfinite_examples"].tolist() == [[1.0, 1.0]]
    assert np.isnan(columns["mean_sq_norm"]).any()
