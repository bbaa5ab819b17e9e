"""Readers of an optimizer's own state: MaxVA's moments where they lie."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import Array, widened
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.source import TakesMoments
from gradiometer.stats_core.temporal import maxva_sums

__all__ = ["OptimizerState", "is_maxva"]

_RULE = frozenset(("betas", "beta_min", "beta_init", "variance", "within"))


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

    def sums(self, moments: Mapping[nn.Parameter, Moments]) -> dict[nn.Parameter, dict[str, Array]]:
        """What the step that comes will do, by the optimizer's own function: catalogue name → scalar, by parameter."""
        groups = [(p, group) for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        wanting = [p for p, group in groups if group["variance"] == "per_example" and p in moments]
        scale: Any = 1.0
        if wanting:
            scale = maxva.gradient_scale([widened(p.grad) for p in wanting], [moments[p].mean for p in wanting])
        found = {}
        for parameter, group in groups:
            if parameter.grad.is_sparse:
                continue
            grad = widened(parameter.grad)
            within: Any = 0.0
            if group["variance"] == "per_example" and parameter in moments:
                within = maxva.within_variance(moments[parameter], group["within"]) * scale
            state = self._optimizer.state.get(parameter) or {}
            before = (
                TemporalMoments(state["u"], state["s"], state["w"])
                if "u" in state
                else TemporalMoments.zeros_like(grad)
            )
            found[parameter] = maxva_sums(
                before,
                grad,
                within,
                beta_max=group["betas"][1],
                beta_min=group["beta_min"],
                beta_init=group["beta_init"],
            ).sums
        return found
