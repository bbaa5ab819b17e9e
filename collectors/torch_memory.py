"""What the collector itself remembers of each parameter from one measured step to the next.

The step-to-step variance and, where no optimizer keeps them, MaxVA's moments begin here.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradiometer.stats_core.arrays import Array
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.temporal import maxva_sums

__all__ = ["OwnMemory"]


class OwnMemory:
    """The collector's own memory: the previous mean, and MaxVA's moments where no optimizer keeps them.

    Fed with the unclipped mean of measured steps, so that with ``every=k`` its clock is k steps.

    Args:
        names: parameter → full name.
        maxva: False where the optimizer keeps MaxVA's moments.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], *, maxva: bool) -> None:
        self._names = names
        self._keeps_maxva = maxva
        self._previous: dict[str, Previous] = {}
        self._temporal: dict[str, TemporalMoments] = {}

    def feed(self, parameter: nn.Parameter, moments: Moments, of_batch: Mapping[str, Array]) -> dict[str, Array]:
        """Take one measured step and the sums of its batch; the sums that time adds, keyed by catalogue name."""
        name = self._names[parameter]
        sums: dict[str, Array] = {}
        now = Previous(moments.mean, of_batch["batch_variance"], of_batch["mean_sq_norm"])
        if (before := self._previous.get(name)) is not None:
            sums.update(step_sums(before, now))
        self._previous[name] = now
        if self._keeps_maxva:
            state = self._temporal.get(name) or TemporalMoments.zeros_like(moments.mean)
            found = maxva_sums(state, moments.mean)
            self._temporal[name] = found.after
            sums.update(found.sums)
        return sums

    def state_dict(self) -> dict[str, Any]:
        """A copy, as plain dictionaries of tensors and floats."""
        return {
            "previous": {name: _copied(value) for name, value in self._previous.items()},
            "temporal": {name: _copied(value) for name, value in self._temporal.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over onto the parameters' devices.

        Raises:
            ValueError: if it holds a parameter that the model has not, or of another shape.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        for part in ("previous", "temporal"):
            for name, fields in state[part].items():
                shape = tuple(parameters[name].shape) if name in parameters else None
                field = "mean" if part == "previous" else "u"
                if shape != tuple(fields[field].shape):
                    raise ValueError(
                        f"load_state_dict needs the state of this model, got parameter={name!r} of shape "
                        f"{tuple(fields[field].shape)} where the model has {shape}; load it into the model it is of"
                    )
        self._previous = {n: Previous(**_onto(parameters[n], f)) for n, f in state["previous"].items()}
        self._temporal = {n: TemporalMoments(**_onto(parameters[n], f)) for n, f in state["temporal"].items()}


def _copied(value: Any) -> dict[str, Any]:
    return {name: part.clone() if isinstance(part, Tensor) else part for name, part in value._asdict().items()}


def _onto(parameter: nn.Parameter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: part.to(parameter.device, copy=True) if isinstance(part, Tensor) else part
        for name, part in fields.items()
    }
