"""Readers of an optimizer's own state, where it lies: MaxVA's moments, and the divisor and step of Adam's family."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gradiometer.stats_core import maxva
from gradiometer.stats_core.adam import AdamStep, adam_step, adam_sums, maxva_step, nadam_mix
from gradiometer.stats_core.arrays import Array, widened
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.radam import never_adaptive, rectify
from gradiometer.stats_core.source import TakesMoments
from gradiometer.stats_core.temporal import MaxvaInput

__all__ = ["AdamState", "OptimizerState", "is_adam", "is_maxva", "never_adaptive_warning"]

_RULE = frozenset(("betas", "beta_min", "beta_init", "variance", "within"))
_RADAM_THRESHOLD = 5.0


def is_maxva(optimizer: Any) -> bool:
    """True for an optimizer whose state is MaxVA's; known by its fields, so that nothing is imported for it."""
    return isinstance(optimizer, TakesMoments) and all(
        group.keys() >= _RULE for group in getattr(optimizer, "param_groups", ())
    )


class OptimizerState:
    """A MaxVA optimizer's u, s and w, read where they lie just before it makes its step.

    Args:
        optimizer: one for which `is_maxva` holds.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def reading(self, moments: Mapping[nn.Parameter, Moments]) -> Callable[[nn.Parameter], MaxvaInput | None]:
        """What the rule is about to take of a parameter; None of one that the optimizer makes no step with.

        Formed when it is asked for, since it holds copies of the parameter.

        Args:
            moments: of the batch.
        """
        groups = dict(_with_grad(self._optimizer))
        scale = _scale([*groups.items()], moments)

        def of(parameter: nn.Parameter) -> MaxvaInput | None:
            group = groups.get(parameter)
            if group is None or parameter.grad is None or parameter.grad.is_sparse:
                return None
            grad = widened(parameter.grad)
            return MaxvaInput(
                _temporal(self._optimizer.state.get(parameter) or {}, grad),
                grad,
                _within(parameter, group, moments, scale),
                {"beta_max": group["betas"][1], "beta_min": group["beta_min"], "beta_init": group["beta_init"]},
            )

        return of


class AdamState:
    """The state of an optimizer of Adam's family, read where it lies just before the optimizer makes its step.

    Known are torch's Adam, AdamW, RAdam and NAdam, in every implementation (for-loop, foreach, fused, capturable),
    subclasses that keep their ``step``, and MAdam. Of any other optimizer nothing is read. A step count that lies
    on the device stays there.

    Args:
        optimizer: any.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._dialect = _dialect(optimizer)

    def steps(self, moments: Mapping[nn.Parameter, Moments] | None = None) -> Iterator[tuple[nn.Parameter, AdamStep]]:
        """The step that comes, for one parameter after the other: each holds three copies of its parameter.

        Parameters without a gradient are passed over, as are sparse gradients and complex parameters.

        Args:
            moments: needed where MAdam takes the variance across examples.
        """
        if self._dialect is None:
            return
        groups = _with_grad(self._optimizer)
        moments = moments or {}
        scale = _scale(groups, moments) if self._dialect is _maxva else 1.0
        for parameter, group in groups:
            state = self._optimizer.state.get(parameter) or {}
            known = not state or ("u" if self._dialect is _maxva else "exp_avg_sq") in state
            if parameter.grad.is_sparse or parameter.is_complex() or not known:
                continue
            with torch.no_grad():
                within = _within(parameter, group, moments, scale) if self._dialect is _maxva else 0.0
                step = self._dialect(state, group, _seen(self._optimizer, parameter, group), within)
                if group.get("maximize"):
                    step = step._replace(momentum=-step.momentum)
            yield parameter, step

    def sums(self, moments: Mapping[nn.Parameter, Moments], scale: Array = 1.0) -> dict[nn.Parameter, dict[str, Array]]:
        """What Adam's geometry makes of the batch: catalogue name → scalar, by parameter.

        Args:
            moments: of the batch; parameters without are passed over.
            scale: squared norm of ``.grad`` over that of the measured mean, as
                `gradiometer.stats_core.adam.adam_sums`.
        """
        loss_scale = getattr(self._optimizer, "grad_scale", None)  # as `_seen`: the optimizer divides by it
        scale = scale if loss_scale is None else scale / loss_scale / loss_scale
        return {
            parameter: adam_sums(step, moments[parameter], scale)
            for parameter, step in self.steps(moments)
            if parameter in moments
        }

    def radam_scalars(self) -> dict[str, Array]:
        """The scalars of the step's catalogue on RAdam's rectification, of the first group; empty for others.

        Numbers, or scalars on the device where the step count lies there.
        """
        if self._dialect is not _radam:
            return {}
        group = self._optimizer.param_groups[0]
        counted = next((p for p in group["params"] if p.grad is not None), None)
        if counted is None:
            return {}
        made = _scalar((self._optimizer.state.get(counted) or {}).get("step", 0.0))
        found = rectify(made + 1, _scalar(group["betas"][1]), threshold=_RADAM_THRESHOLD)
        return {
            "radam_length": found.length,
            "radam_rectification": found.rectification,
            "radam_rectified": found.is_rectified * 1.0,
            "radam_multiplier": found.multiplier,
        }


def is_adam(optimizer: Any) -> bool:
    """True for an optimizer that `AdamState` can read."""
    return _dialect(optimizer) is not None


def never_adaptive_warning(optimizer: Any) -> str | None:
    """What to say, once, of a RAdam that will never make an adaptive step; None where there is nothing to say."""
    if _dialect(optimizer) is not _radam:
        return None
    for number, group in enumerate(optimizer.param_groups):
        beta2 = float(group["betas"][1])
        if never_adaptive(beta2, _RADAM_THRESHOLD):
            return (
                f"RAdam needs betas[1] > 2/3 to ever make an adaptive step, got betas[1]={beta2:g} in parameter group "
                f"{number}; as it is, each of its steps is momentum: choose a larger betas[1], or SGD with momentum"
            )
    return None


def _adam(state: Mapping[str, Any], group: Mapping[str, Any], grad: Any, _within: Any) -> AdamStep:
    return adam_step(*_raw(state, grad), grad, **_rates(group), largest=_largest(state, group, grad))


def _radam(state: Mapping[str, Any], group: Mapping[str, Any], grad: Any, _within: Any) -> AdamStep:
    return adam_step(*_raw(state, grad), grad, **_rates(group), eps_on="raw", threshold=_RADAM_THRESHOLD)


def _nadam(state: Mapping[str, Any], group: Mapping[str, Any], grad: Any, _within: Any) -> AdamStep:
    first, second, made = _raw(state, grad)
    rates = _rates(group)
    mix = nadam_mix(made, rates["b1"], _scalar(group["momentum_decay"]), _scalar(state.get("mu_product", 1.0)))
    return adam_step(first, second, made, grad, **rates, mix=mix)


def _maxva(state: Mapping[str, Any], group: Mapping[str, Any], grad: Any, within: Any) -> AdamStep:
    return maxva_step(
        state["m"] if state else torch.zeros_like(grad),
        _temporal(state, grad),
        _scalar(state.get("step", 0)),
        grad,
        within,
        lr=_scalar(group["lr"]),
        b1=group["betas"][0],
        eps=group["eps"],
        eps_mode=group["eps_mode"],
        largest=state.get("max_denominator") if group["amsgrad"] else None,
        beta_max=group["betas"][1],
        beta_min=group["beta_min"],
        beta_init=group["beta_init"],
    )


_Dialect = Callable[[Mapping[str, Any], Mapping[str, Any], Any, Any], AdamStep]


def _dialect(optimizer: Any) -> _Dialect | None:
    """The reader of the optimizer's state; known by the ``step`` that it runs, so that a subclass's own is not read."""
    mine = inspect.unwrap(getattr(type(optimizer), "step", _dialect))
    if is_maxva(optimizer):
        return _maxva if mine.__qualname__ == "MAdam.step" else None
    for known, dialect in (
        (torch.optim.Adam, _adam),
        (torch.optim.AdamW, _adam),
        (torch.optim.RAdam, _radam),
        (torch.optim.NAdam, _nadam),
    ):
        if mine is inspect.unwrap(known.step):
            return dialect
    return None


def _raw(state: Mapping[str, Any], grad: Any) -> tuple[Any, Any, Any]:
    """m, v and the number of steps made; zeros before the first."""
    if not state:
        zeros = torch.zeros_like(grad)
        return zeros, zeros, 0
    return state["exp_avg"], state["exp_avg_sq"], _scalar(state["step"])


def _rates(group: Mapping[str, Any]) -> dict[str, Any]:
    b1, b2 = group["betas"]
    return {"lr": _scalar(group["lr"]), "b1": _scalar(b1), "b2": _scalar(b2), "eps": _scalar(group["eps"])}


def _largest(state: Mapping[str, Any], group: Mapping[str, Any], grad: Any) -> Any:
    if not group["amsgrad"]:
        return None
    return state["max_exp_avg_sq"] if "max_exp_avg_sq" in state else torch.zeros_like(grad)


def _seen(optimizer: Any, parameter: Any, group: Mapping[str, Any]) -> Any:
    """The gradient as the optimizer's moments will take it."""
    grad = widened(parameter.grad)
    loss_scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler on fused optimizers, which divide by it
    if loss_scale is not None:
        grad = grad / loss_scale
    if group.get("maximize"):
        grad = -grad
    decay = group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW) or "eps_mode" in group)
    if not decoupled and (torch.is_tensor(decay) or decay != 0):
        grad = grad + decay * widened(parameter)
    return grad


def _scalar(value: Any) -> Any:
    """A hyperparameter or step count as a number; where it lies on an accelerator, as the scalar that it is there."""
    if not torch.is_tensor(value):
        return value
    return value.item() if value.device.type == "cpu" else value.reshape(())


def _with_grad(optimizer: Any) -> list[tuple[Any, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _scale(groups: list[tuple[Any, dict[str, Any]]], moments: Mapping[nn.Parameter, Moments]) -> Any:
    """What MAdam multiplies the examples' variance by: what was done to the gradient since it was measured."""
    wanting = [p for p, group in groups if group["variance"] == "per_example" and p in moments]
    if not wanting:
        return 1.0
    return maxva.gradient_scale([widened(p.grad) for p in wanting], [moments[p].mean for p in wanting])


def _within(parameter: Any, group: Mapping[str, Any], moments: Mapping[nn.Parameter, Moments], scale: Any) -> Any:
    """τ² as MAdam takes it."""
    if group["variance"] != "per_example" or parameter not in moments:
        return 0.0
    return maxva.within_variance(moments[parameter], group["within"]) * scale


def _temporal(state: Mapping[str, Any], grad: Any) -> TemporalMoments:
    """u, s and w; zeros before the first step."""
    if "u" not in state:
        return TemporalMoments.zeros_like(grad)
    return TemporalMoments(state["u"], state["s"], state["w"])
