"""The Opacus engine against the float64 loop over single examples."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import gradiometer as gm
from gradiometer.collectors.torch_engine import moments_of
from tests.reference import loop_moments, relative_error
from tests.torch_models import CASES, Case, assert_agrees, case, reference_moments, squared

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def one_pass(chosen: Case, model: nn.Module, x, y, **attach) -> tuple[gm.Moments, object]:
    with gm.attach(model, endpoint="off", **attach) as collector:
        chosen.losses(model(x), y).mean().backward()
        return dict(collector.moments), collector.coverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: chosen.name)
def test_moments_equal_the_loop_and_the_rest_is_uncovered_by_name(chosen: Case, dtype: torch.dtype) -> None:
    model = chosen.make(dtype)
    x, y = chosen.draw(5, dtype)
    wanted = reference_moments(chosen, model, x, y)
    found, coverage = one_pass(chosen, model, x, y)
    assert set(found) == {name for name in wanted if chosen.covers(name)}
    for name, moments in found.items():
        assert moments.mean.dtype == dtype
        assert_agrees(moments, wanted[name], TOLERANCE[dtype], name)
    reasons = {uncovered.parameter: uncovered.reason for uncovered in coverage.uncovered}
    assert set(reasons) == {name for name in wanted if not chosen.covers(name)}
    for prefix, reason in chosen.uncovered.items():
        assert all(reason in text for name, text in reasons.items() if name.startswith(prefix))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert coverage.num_params == sum(sizes.values())
    assert coverage.num_params_measured == sum(sizes[name] for name in found)


@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: chosen.name)
def test_loss_and_gradients_are_bitwise_those_without_a_collector(chosen: Case) -> None:
    x, y = chosen.draw(5)
    results = []
    for attached in (False, True):
        model = chosen.make()
        torch.manual_seed(3)
        collector = gm.attach(model, endpoint="off") if attached else None
        losses = []
        for _ in range(2):
            loss = chosen.losses(model(x), y).mean()
            loss.backward()
            losses.append(loss.detach())
        results.append((losses, [p.grad for p in model.parameters()], torch.rand(1)))
        if collector is not None:
            collector.detach()
    (losses, grads, drawn), (losses_with, grads_with, drawn_with) = results
    assert torch.equal(torch.stack(losses), torch.stack(losses_with))
    assert torch.equal(drawn, drawn_with)
    for plain, observed in zip(grads, grads_with, strict=True):
        assert (plain is None) == (observed is None)
        assert plain is None or torch.equal(plain, observed)


def test_a_smaller_last_batch_is_measured_as_it_is() -> None:
    chosen = case("gpt-positions-per-row")
    model = chosen.make()
    with gm.attach(model, endpoint="off") as collector:
        for batch in (6, 2, 6, 1):
            x, y = chosen.draw(batch, seed=batch)
            wanted = reference_moments(chosen, model, x, y)
            chosen.losses(model(x), y).mean().backward()
            for name, moments in collector.moments.items():
                assert_agrees(moments, wanted[name], 1e-5, name)
            assert set(collector.moments) == set(wanted)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_gradients_far_from_one_keep_their_digits(scale: float) -> None:
    chosen = case("mlp")
    model = chosen.make()
    x, y = chosen.draw(5)
    wanted = reference_moments(chosen, model, x, y)
    with gm.attach(model, endpoint="off") as collector:
        (chosen.losses(model(x), y).mean() * scale).backward()
        for name, moments in collector.moments.items():
            plain = moments._replace(
                mean=moments.mean.double() / scale,
                m2=moments.m2.double() / scale**2,
                sq_norms=moments.sq_norms.double() / scale**2,
            )
            assert_agrees(plain, wanted[name], 1e-5, name)
        assert len(collector.moments) == len(wanted)


@pytest.mark.parametrize("chosen", [case("mlp"), case("cnn"), case("gpt-positions-per-row")], ids=lambda c: c.name)
def test_half_precision_is_accumulated_in_float32_with_at_most_twice_the_error_of_a_half_precision_loop(
    chosen: Case,
) -> None:
    """Root mean square over draws: one draw of a small bias may be right by chance."""
    model = chosen.make()
    parameters = dict(model.named_parameters())
    errors = {name: np.zeros((2, 2)) for name in parameters}  # (mean, m2) x (found, loop)
    with gm.attach(model, endpoint="off") as collector:
        for seed in range(8):
            x, y = chosen.draw(6, seed=seed)
            wanted = reference_moments(chosen, model, x, y)
            loop = []
            with torch.autocast("cpu", torch.bfloat16):
                with collector.paused():
                    for row in range(6):
                        loss = chosen.losses(model(x[row : row + 1]).float(), y[row : row + 1]).sum()
                        loop.append(torch.autograd.grad(loss, list(parameters.values())))
                loss = chosen.losses(model(x).float(), y).mean()
            loss.backward()
            for name, *grads in zip(parameters, *loop, strict=True):
                moments, exact = collector.moments[name], wanted[name]
                assert moments.mean.dtype == moments.m2.dtype == torch.float32
                by_loop = loop_moments([grad.double().numpy() for grad in grads])
                errors[name][0] += [relative_error(m.mean, exact.mean) ** 2 for m in (moments, by_loop)]
                errors[name][1] += [relative_error(m.m2, exact.m2) ** 2 for m in (moments, by_loop)]
    for name, squares in errors.items():
        assert np.all(np.sqrt(squares[:, 0]) <= 2 * np.sqrt(squares[:, 1])), name


def test_half_precision_parameters_are_measured_in_float32() -> None:
    chosen = case("mlp")
    model = chosen.make(torch.bfloat16)
    x, y = chosen.draw(5, torch.bfloat16)
    wanted = reference_moments(chosen, model, x, y)
    found, _ = one_pass(chosen, model, x, y)
    for name, moments in found.items():
        assert moments.mean.dtype == moments.m2.dtype == torch.float32
        assert relative_error(moments.mean, wanted[name].mean) < 0.03
    assert len(found) == len(wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_examples_that_are_not_numbers_stay_in_the_moments(value: float) -> None:
    chosen = case("mlp")
    model = chosen.make()
    x, y = chosen.draw(5)
    x[2, 0] = value
    found, coverage = one_pass(chosen, model, x, y)
    assert not coverage.uncovered
    finite = torch.isfinite(found["0.weight"].sq_norms)
    assert finite.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 300, 400), (3, 700_001), (1, 600_000)], ids=str)
def test_large_parameters_are_reduced_in_tiles_to_the_same_moments(shape: tuple[int, ...], weighted: bool) -> None:
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3.0
    weights = torch.arange(1.0, shape[0] + 1) if weighted else None
    tiled, whole = moments_of(samples, weights), gm.Moments.from_per_example(samples, weights)
    torch.testing.assert_close(tiled.mean, whole.mean)
    torch.testing.assert_close(tiled.m2, whole.m2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled.sq_norms, whole.sq_norms)
    assert tiled._replace(mean=0, m2=0, sq_norms=0, weights=0) == whole._replace(mean=0, m2=0, sq_norms=0, weights=0)


@pytest.mark.parametrize("shape", [(5, 300, 400), (4, 3)], ids=str)
def test_dots_and_signs_are_there_where_they_are_asked_for(shape: tuple[int, ...]) -> None:
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    weights = torch.arange(1.0, shape[0] + 1)
    found = moments_of(samples, weights, frozenset({"dots", "sign_mean"}))
    share = (weights / weights.sum()).reshape(-1, *([1] * (len(shape) - 1)))
    mean = (share * samples).sum(0)
    torch.testing.assert_close(found.dots, (samples * mean).flatten(1).sum(1), check_dtype=False)
    torch.testing.assert_close(found.sign_mean, (share * samples.sign()).sum(0), check_dtype=False)
    plain = moments_of(samples, weights)
    assert plain.dots is None
    assert plain.sign_mean is None


def test_an_input_changed_in_place_after_its_use_is_noticed() -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            hidden = self.first(x)
            x += 1.0
            return self.last(torch.tanh(hidden))

    model = Reuses()
    x, y = case("mlp").draw(5)
    with gm.attach(model, endpoint="off") as collector, torch.autocast("cpu", torch.bfloat16):
        # Under autocast the layer saves a copy, so that autograd does not mind.
        squared(model(x).float(), y).mean().backward()
        assert {u.parameter for u in collector.coverage.uncovered} == {"first.weight", "first.bias"}
        assert "changed in place" in collector.coverage.uncovered[0].reason


def test_a_sampler_that_fails_uncovers_its_layer_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    from opacus.grad_sample import register_grad_sampler

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    @register_grad_sampler(Own)
    def sample(module: Own, inputs: list[torch.Tensor], grad: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
        raise RuntimeError("not today")

    model = nn.Sequential(Own(), nn.Linear(6, 3))
    x, y = case("mlp").draw(5)
    with caplog.at_level(logging.WARNING, "gradiometer"), gm.attach(model, endpoint="off") as collector:
        squared(model(x), y).mean().backward()
        assert set(collector.moments) == {"1.weight", "1.bias"}
        assert collector.coverage.uncovered[0].reason == "its sampler failed with RuntimeError"  # not what it says
    assert not caplog.records


def test_a_sampler_that_forgets_a_parameter_leaves_no_tensor_in_the_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleHooks

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, lambda *_: {})
    model = nn.Linear(3, 2)
    with gm.attach(model, endpoint="off") as collector:
        model(torch.ones(4, 3)).mean().backward()
        assert {uncovered.reason for uncovered in collector.coverage.uncovered} == {"its sampler failed with KeyError"}
