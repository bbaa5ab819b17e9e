"""What the catalogue says of a statistic, and of a number of a step."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["INGREDIENTS", "Kind", "Scalar", "Statistic", "Tier"]

Kind = Literal["sum", "mean", "count", "example", "histogram", "outliers", "ratio", "formula"]
Tier = Literal["light", "default", "full"]

INGREDIENTS = {
    "count": "field of Moments",
    "weight_sum": "field of Moments",
    "weight_sq_sum": "field of Moments",
    "mean": "field of Moments",
    "m2": "field of Moments",
    "sq_norms": "field of Moments",
    "weights": "field of Moments",
    "dots": "field of Moments, computed on request: one dot product with the mean an example",
    "sign_mean": "field of Moments, computed on request: one pass over the per-example gradients",
    "previous": "the mean of the measured step before: one parameter copy",
    "temporal": "MaxVA's u, s, w: the optimizer's own, or three parameter copies",
    "fixed": "a mean and a variance under one fixed coefficient: two parameter copies",
    "kish": "the sum of squares of MaxVA's weights: one parameter copy",
    "adam": "the state of an optimizer of Adam's family before its step",
}
"""What a travelling statistic may need, and what that costs."""

_POWERS = {"(loss/parameter)²": 2, "loss/parameter": 1, "parameter/loss": -1, "(parameter/loss)²": -2}


@dataclass(frozen=True)
class Statistic:
    """One statistic of a layer.

    Attributes:
        name: the only spelling, in code, on the wire, in the store and in the docs.
        symbol: the literature's.
        unit: what it is measured in.
        help: one sentence, no full stop.
        formula: plain text, in the symbols of the glossary.
        kind: how it adds up, see the module.
        tier: the cheapest tier that carries it; None where it is measured only if asked for by name.
        needs: names in `INGREDIENTS` of what travels, terms of what readers form.
        metric: name in Prometheus behind ``gradiometer_layer_``, or None where it is not exported.
        interval: True where `gradiometer.stats_core.window` gives a 95 % interval.
    """

    name: str
    symbol: str
    unit: str
    help: str
    formula: str
    kind: Kind
    tier: Tier | None
    needs: tuple[str, ...]
    metric: str | None = None
    interval: bool = False

    @property
    def travels(self) -> bool:
        """True for what is measured and sent; False for what readers form."""
        return self.kind not in ("ratio", "formula")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns and scalars that the terms are made of; the statistic itself where it travels."""
        if self.travels:
            return (self.name,)
        return tuple(dict.fromkeys(part for term in self.needs for part in term.split("*")))

    @property
    def power(self) -> int:
        """By which power of c it grows where every gradient grows by c."""
        return _POWERS.get(self.unit, 0)


@dataclass(frozen=True)
class Scalar:
    """One number of a step, as in the store's table ``steps``. Attributes as in `Statistic`."""

    name: str
    unit: str
    help: str
    metric: str | None = None
