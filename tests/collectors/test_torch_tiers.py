"""Selections of statistics in the PyTorch collector: what is asked for is measured, and no more."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import gradiometer as gm
from gradiometer.collectors import torch_engine
from gradiometer.optimizers.torch_api import MAdam
from gradiometer.stats_core import catalog, maxva, selection
from gradiometer.stats_core.histogram import Histogram
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import variance
from tests.reference import loop_moments
from tests.torch_models import case, example_grads, squared
from tests.torch_recording import Recorder, recorder  # noqa: F401 - a fixture

MLP = case("mlp")


def trained(
    statistics: Any, optimizer_type: Any = torch.optim.Adam, steps: int = 3, batch: int = 6, **options: Any
) -> list[dict[str, list[np.ndarray]]]:
    """Train in float64 with a collector; each step's per-example gradients by parameter."""
    model = MLP.make(torch.float64)
    optimizer = optimizer_type(model.parameters(), lr=0.05)
    seen = []
    with gm.attach(model, optimizer, statistics=statistics, **options) as collector:
        for step in range(steps):
            x, y = MLP.draw(batch, torch.float64, seed=step)
            seen.append(example_grads(MLP, model, x, y))
            optimizer.zero_grad()
            with collector.batch(ids=[f"{step}/{row}" for row in range(batch)]):
                squared(model(x), y).mean().backward()
            optimizer.step()
    return seen


def of_layer(recorder: Recorder, step: dict[str, list[np.ndarray]], number: int) -> np.ndarray:  # noqa: F811
    """A layer's per-example gradients, shape (batch, elements)."""
    parts = [np.stack(step[name]) for name in recorder.run.layers[number].parameters]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def test_every_travelling_statistic_of_the_full_tier_exists_after_some_steps(recorder: Recorder) -> None:  # noqa: F811
    trained("full", steps=4)
    for row in catalog.WIRE:
        assert np.isfinite(recorder.steps[3][row.name]).all(), row.name
    assert set(recorder.sketches[3]) == set(selection.sketches("full"))
    assert recorder.outliers[3][0] is None  # they have to be asked for by name


def test_directions_equal_the_loop_over_examples(recorder: Recorder) -> None:  # noqa: F811
    seen = trained(["conflicting_share", "example_cosine", "inner_product_test", "deviation_kurtosis"])
    whole = np.concatenate([of_layer(recorder, seen[2], n) for n in range(len(recorder.run.layers))], axis=1)
    for number in range(-1, len(recorder.run.layers)):
        grads = whole if number < 0 else of_layer(recorder, seen[2], number)
        found = recorder.scalars[2] if number < 0 else {n: c[number] for n, c in recorder.steps[2].items()}
        n, mean = len(grads), grads.mean(axis=0)
        others = [np.delete(grads, i, axis=0).mean(axis=0) for i in range(n)]
        against = [float(g @ o) for g, o in zip(grads, others, strict=True)]
        assert found["conflicting_share"] == pytest.approx(sum(a < 0 for a in against) / n)
        cosines = [a / np.linalg.norm(g) / np.linalg.norm(o) for a, g, o in zip(against, grads, others, strict=True)]
        assert found["example_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)
        along = (grads - mean) @ mean / np.linalg.norm(mean)
        assert found["parallel_variance"] == pytest.approx((along**2).sum() / (n * (n - 1)), rel=1e-5)
        distance = ((grads - mean) ** 2).sum(axis=1)
        assert found["deviation_kurtosis"] == pytest.approx((distance**2).mean() / distance.mean() ** 2, rel=1e-5)


def test_elements_and_signs_equal_the_loop_over_elements(recorder: Recorder) -> None:  # noqa: F811
    seen = trained(["gsnr", "evidence", "significant_share", "sign_snr_kept", "sign_disagreement"])
    for number in range(len(recorder.run.layers)):
        grads = of_layer(recorder, seen[1], number)
        n, mean, noise = len(grads), grads.mean(axis=0), grads.var(axis=0, ddof=1)
        active = noise > 1e-30
        squared_t = n * mean[active] ** 2 / noise[active]
        found = {name: column[number] for name, column in recorder.steps[1].items()}
        assert found["active_elements"] == active.sum()
        gsnr = (n - 3) / (n - 1) * squared_t / n - 1 / n
        assert found["gsnr_sum"] == pytest.approx(gsnr.sum(), rel=1e-4)
        assert found["evidence_sum"] == pytest.approx((1 - (n - 3) / (n - 1) * squared_t).sum(), rel=1e-4)
        assert found["significant_elements"] == (squared_t > 2.570582**2).sum()  # t of .975 with 5 degrees of freedom
        signs = np.sign(grads).mean(axis=0)[active]
        assert found["sign_signal"] == pytest.approx(((n * signs**2 - 1) / (n - 1)).sum(), rel=1e-5)
        assert found["sign_noise"] == pytest.approx((n * (1 - signs**2) / (n - 1)).sum(), rel=1e-5)
        # As many examples either way: a sign that is 0, half a disagreement.
        assert found["sign_disagreements"] == (np.abs(np.sign(signs) - np.sign(mean[active])) / 2).sum()


def test_outliers_come_under_the_users_own_ids(recorder: Recorder) -> None:  # noqa: F811
    seen = trained(["light", "outliers"])
    norms = sum((of_layer(recorder, seen[2], number) ** 2).sum(axis=1) for number in range(len(recorder.run.layers)))
    outliers, ids = recorder.outliers[2]
    assert ids == [f"2/{row}" for row in range(6)]
    assert outliers.rows.tolist() == np.argsort(-norms).tolist()
    np.testing.assert_allclose(outliers.sq_norms, np.sort(norms)[::-1], rtol=1e-9)


def test_ids_of_accumulated_passes_are_one_batch(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.attach(model, optimizer, statistics="full,outliers") as collector:
        for number in range(2):
            x, y = MLP.draw(3, seed=number)
            with collector.batch(ids=[10 * number + row for row in range(3)]):
                (squared(model(x), y).mean() / 2).backward()
        optimizer.step()
    outliers, ids = recorder.outliers[0]
    assert ids == [0, 1, 2, 10, 11, 12]
    assert len(outliers.rows) == 6
    # Each pass knows the dots with its own mean alone; signs merge.
    assert np.isnan(recorder.steps[0]["conflicting_share"]).all()
    assert np.isfinite(recorder.steps[0]["sign_signal"]).all()


def test_sketches_count_every_element_and_every_example(recorder: Recorder) -> None:  # noqa: F811
    seen = trained("full", steps=3)
    for number, layer in enumerate(recorder.run.layers):
        grads = of_layer(recorder, seen[2], number)
        norms = Histogram.from_sketch(recorder.sketches[2]["example_norm"], number)
        assert norms.count == 6
        assert norms.quantile(1.0) == pytest.approx(np.linalg.norm(grads, axis=1).max(), rel=0.045)
        active = int((grads.var(axis=0) > 1e-30).sum())
        assert Histogram.from_sketch(recorder.sketches[2]["element_t_sq"], number).count == active
        states = {name: TemporalMoments.zeros_like(loop_moments(seen[0][name]).mean) for name in layer.parameters}
        ratios = []
        for step in seen:
            ratios = []
            for name in layer.parameters:
                mean = loop_moments(step[name]).mean
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = maxva.deviation_ratio(states[name], mean)
                ratios.extend(ratio[states[name].s > 0])
                states[name], _ = maxva.update(states[name], mean)
        found = Histogram.from_sketch(recorder.sketches[2]["element_deviation_ratio"], number)
        assert found.count == len(ratios)
        assert found.quantile(0.5) == pytest.approx(np.sort(ratios)[(len(ratios) - 1) // 2], rel=0.1)


def test_adams_geometry_is_that_of_the_state_before_the_step(recorder: Recorder) -> None:  # noqa: F811
    model = MLP.make(torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, betas=(0.9, 0.99))
    with gm.attach(model, optimizer, statistics=["preconditioned_noise_scale", "step_size"]) as collector:
        for step in range(3):
            x, y = MLP.draw(6, torch.float64, seed=step)
            optimizer.zero_grad()
            squared(model(x), y).mean().backward()
            wanted = {}
            for name, parameter in model.named_parameters():
                state = optimizer.state.get(parameter)
                if state:
                    divisor = (state["exp_avg_sq"] / (1 - 0.99 ** float(state["step"]))).sqrt() + 1e-8
                    wanted[name] = float((variance(collector.moments[name]) / divisor**2).sum())
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            optimizer.step()
            moved = {name: (p.detach() - before[name]).abs() for name, p in model.named_parameters()}
    assert np.isnan(recorder.steps[0]["preconditioned_variance"]).all()
    for number, layer in enumerate(recorder.run.layers):
        total = sum(wanted[name] for name in layer.parameters)
        assert recorder.steps[2]["preconditioned_variance"][number] == pytest.approx(total, rel=1e-5)
        size = torch.cat([moved[name].ravel() for name in layer.parameters]).mean()
        assert recorder.steps[2]["step_size"][number] == pytest.approx(float(size), rel=1e-5)


def test_radams_rectification_is_a_scalar_of_the_step(recorder: Recorder) -> None:  # noqa: F811
    trained(["preconditioned_noise_scale"], torch.optim.RAdam, steps=8)
    assert [recorder.scalars[step]["radam_rectified"] for step in range(8)] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert recorder.scalars[5]["radam_length"] == pytest.approx(5.9942, abs=1e-4)
    assert recorder.scalars[5]["radam_rectification"] == pytest.approx(0.0258, abs=1e-4)


def test_a_radam_that_never_adapts_is_warned_of_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    model = MLP.make()
    optimizer = torch.optim.RAdam(model.parameters(), betas=(0.9, 0.6))
    with caplog.at_level("WARNING", "gradiometer"):
        gm.attach(model, optimizer, endpoint="off").detach()
    assert "betas[1] > 2/3" in caplog.text


def test_what_nobody_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:  # noqa: F811
    asked: list[frozenset[str]] = []
    original = torch_engine.moments_of

    def watched(samples: Any, weights: Any, ingredients: frozenset[str]) -> Any:
        asked.append(ingredients & {"dots", "sign_mean"})
        return original(samples, weights, ingredients)

    monkeypatch.setattr(torch_engine, "moments_of", watched)
    for statistics, wanted in (("default", set()), ("sign_snr", {"sign_mean"}), ("full", {"dots", "sign_mean"})):
        asked.clear()
        recorder.steps.clear()
        trained(statistics, steps=1)
        assert set(asked) == {frozenset(wanted)}


def test_light_keeps_nothing_from_step_to_step() -> None:
    model = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gm.attach(model, optimizer, endpoint="off", statistics="light") as collector:
        x, y = MLP.draw(4)
        squared(model(x), y).mean().backward()
        optimizer.step()
        state = collector.state_dict()
    assert all(state[kind] == {} for kind in ("previous", "temporal", "fixed", "kish"))


def test_an_optimizers_own_maxva_moments_have_kishs_number_too(recorder: Recorder) -> None:  # noqa: F811
    trained("full", MAdam, steps=4)
    found = recorder.steps[3]["effective_steps"]
    assert ((found > 1.0) & (found <= 4.0)).all()


def test_memory_of_the_full_tier_is_restored_by_name(recorder: Recorder) -> None:  # noqa: F811
    def run(pieces: list[int]) -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        model = MLP.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder.steps.clear()
        state: Any = None
        step = 0
        for piece in pieces:
            with gm.attach(model, optimizer, statistics="full") as collector:
                if state is not None:
                    collector.load_state_dict(state)
                for _ in range(piece):
                    x, y = MLP.draw(4, seed=step)
                    optimizer.zero_grad()
                    squared(model(x), y).mean().backward()
                    optimizer.step()
                    step += 1
                state = collector.state_dict()
        return recorder.steps[step - 1]

    whole, resumed = run([5]), run([3, 2])
    for name in ("effective_steps", "fixed_variance", "consecutive_dot"):
        np.testing.assert_array_equal(whole[name], resumed[name])
        assert not any(map(math.isnan, whole[name]))
