"""What the collector itself remembers of each parameter from one measured step to the next.

The step-to-step variance begins here, and so do MaxVA's moments where no optimizer keeps them, the number of steps
that they rest on, and the moments under a fixed coefficient.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradiometer.stats_core.arrays import Array
from gradiometer.stats_core.histogram import Sketch, sketch_fixed
from gradiometer.stats_core.maxva import TemporalMoments, deviation_ratio
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.selection import Selection
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.temporal import FIXED_BETA, FixedMoments, MaxvaInput, fixed_sums, maxva_sums

__all__ = ["OwnMemory"]

_KINDS = {"previous": Previous, "temporal": TemporalMoments, "fixed": FixedMoments}


class OwnMemory:
    """The collector's own memory, of no more than what was asked for.

    Fed with the unclipped mean of measured steps, so that with ``every=k`` its clock is k steps.

    Args:
        names: parameter → full name.
        wanted: what is measured.
        maxva: False where the optimizer keeps MaxVA's moments.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], wanted: Selection, *, maxva: bool) -> None:
        self._names = names
        self._wanted = wanted
        self._keeps_maxva = maxva and "temporal" in wanted.ingredients
        self._kept: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        self._kish: dict[str, Tensor] = {}

    def feed(
        self, parameter: nn.Parameter, moments: Moments, of_batch: Mapping[str, Array], seen: MaxvaInput | None
    ) -> tuple[dict[str, Array], dict[str, Sketch]]:
        """Take one measured step.

        Args:
            parameter: whose.
            moments: of the step.
            of_batch: ``batch_variance`` and ``mean_sq_norm`` of it.
            seen: what the optimizer's own rule of MaxVA is about to take; None where it has none.

        Returns:
            The sums and the sketches that time adds, keyed by catalogue name.
        """
        name, needed = self._names[parameter], self._wanted.ingredients
        sums: dict[str, Array] = {}
        sketches: dict[str, Sketch] = {}
        if "previous" in needed:
            now = Previous(moments.mean, of_batch["batch_variance"], of_batch["mean_sq_norm"])
            if (before := self._kept["previous"].get(name)) is not None:
                sums.update(step_sums(before, now))
            self._kept["previous"][name] = now
        if "fixed" in needed:
            fixed = self._kept["fixed"].get(name) or FixedMoments.zeros_like(moments.mean)
            found, self._kept["fixed"][name] = fixed_sums(fixed, moments.mean, FIXED_BETA)
            sums.update(found)
        if self._keeps_maxva:
            state = self._kept["temporal"].get(name) or TemporalMoments.zeros_like(moments.mean)
            seen = MaxvaInput(state, moments.mean)
        if seen is not None:
            if "element_deviation_ratio" in self._wanted.sketches:
                ratio = deviation_ratio(seen.before, seen.grad)
                sketches["element_deviation_ratio"] = sketch_fixed(ratio, seen.before.s > 0)
            if "kish" in needed and name not in self._kish:
                self._kish[name] = seen.grad.new_zeros(seen.grad.shape)
            made = maxva_sums(seen.before, seen.grad, seen.within, kish=self._kish.get(name), **seen.betas)
            sums.update(made.sums)
            if made.kish is not None:
                self._kish[name] = made.kish
            if self._keeps_maxva:
                self._kept["temporal"][name] = made.after
        return sums, sketches

    def state_dict(self) -> dict[str, Any]:
        """A copy, as plain dictionaries of tensors and floats."""
        kept = {kind: {name: _copied(value) for name, value in held.items()} for kind, held in self._kept.items()}
        return {**kept, "kish": {name: value.clone() for name, value in self._kish.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over onto the parameters' devices. What it lacks begins anew.

        Raises:
            ValueError: if it holds a parameter that the model has not, or of another shape.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        for kind in (*_KINDS, "kish"):
            for name, fields in state.get(kind, {}).items():
                shape = tuple(parameters[name].shape) if name in parameters else None
                whole = fields if kind == "kish" else fields["mean" if kind == "previous" else "u"]
                if shape != tuple(whole.shape):
                    raise ValueError(
                        f"load_state_dict needs the state of this model, got parameter={name!r} of shape "
                        f"{tuple(whole.shape)} where the model has {shape}; load it into the model it is of"
                    )
        for kind, make in _KINDS.items():
            found = state.get(kind, {})
            self._kept[kind] = {n: make(**_onto(parameters[n], fields)) for n, fields in found.items()}
        self._kish = {n: value.to(parameters[n].device, copy=True) for n, value in state.get("kish", {}).items()}


def _copied(value: Any) -> dict[str, Any]:
    return {name: part.clone() if isinstance(part, Tensor) else part for name, part in value._asdict().items()}


def _onto(parameter: nn.Parameter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: part.to(parameter.device, copy=True) if isinstance(part, Tensor) else part
        for name, part in fields.items()
    }
