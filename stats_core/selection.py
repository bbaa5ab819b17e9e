"""Which statistics a user asked for, and what must be measured for them: no more.

A selection is a tier ("light", "default", "full"), the name of a statistic, or several of both: as a sequence,
or as one string with commas, which is how a run's registration spells it.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

from gradiometer.stats_core.catalog import STATISTICS, statistic
from gradiometer.stats_core.rows import Statistic, Tier

__all__ = ["Selection", "Statistics", "columns", "ingredients", "selected", "sketches", "spelled"]

Statistics = str | Sequence[str]

_TIERS: tuple[Tier, ...] = get_args(Tier)
_ALWAYS = ("count", "effective_count")


def spelled(statistics: Statistics) -> str:
    """The selection as one string.

    Raises:
        ValueError: if it holds a name that is neither a tier nor a statistic, or nothing.

    Example:
        >>> spelled(["default", "conflicting_share"])
        'default,conflicting_share'
    """
    names = statistics.split(",") if isinstance(statistics, str) else list(statistics)
    names = [name.strip() if isinstance(name, str) else name for name in names]
    known = {*_TIERS, *(row.name for row in STATISTICS)}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"a selection of statistics needs tiers in {_TIERS} or names of the catalogue, "
            f"got statistics={unknown[0] if unknown else names!r}; see docs/glossary.md"
        )
    return ",".join(dict.fromkeys(names))


def selected(statistics: Statistics) -> frozenset[str]:
    """Names of all that travels for a selection; what readers form is answered by what it is made of.

    Raises:
        ValueError: as `spelled`.

    Example:
        >>> sorted(selected("noise_scale"))
        ['count', 'effective_count', 'grad_sq_norm', 'variance_trace']
    """
    found: set[str] = set(_ALWAYS)
    for name in spelled(statistics).split(","):
        if name in _TIERS:
            tiers = _TIERS[: _TIERS.index(name) + 1]
            found.update(row.name for row in STATISTICS if row.travels and row.tier in tiers)
        else:
            found.update(statistic(name).columns)
    return frozenset(row.name for row in STATISTICS if row.travels and row.name in found)


def columns(statistics: Statistics = "default") -> tuple[str, ...]:
    """Names of the columns that travel for a selection, in the table's order.

    Raises:
        ValueError: as `spelled`.

    Example:
        >>> columns("light")[:3]
        ('count', 'effective_count', 'nonfinite_examples')
        >>> columns(["noise_scale"])
        ('count', 'effective_count', 'variance_trace', 'grad_sq_norm')
    """
    return tuple(row.name for row in _rows(statistics) if row.kind not in ("histogram", "outliers"))


def sketches(statistics: Statistics = "default") -> tuple[str, ...]:
    """Names of the histograms that travel for a selection, in the table's order.

    Example:
        >>> sketches("default"), sketches(["element_t_sq"])
        ((), ('element_t_sq',))
    """
    return tuple(row.name for row in _rows(statistics) if row.kind == "histogram")


def ingredients(statistics: Statistics = "default") -> frozenset[str]:
    """What of `gradiometer.stats_core.rows.INGREDIENTS` a selection needs: a collector computes no more.

    Example:
        >>> "dots" in ingredients("default"), "dots" in ingredients(["conflicting_share"])
        (False, True)
    """
    return frozenset(need for row in _rows(statistics) for need in row.needs)


def _rows(statistics: Statistics) -> list[Statistic]:
    names = selected(statistics)
    return [row for row in STATISTICS if row.name in names]


class Selection(NamedTuple):
    """A selection taken apart, once, for those who measure.

    Attributes:
        spelled: as one string.
        columns: names of the columns that travel, in the table's order.
        sketches: names of the histograms.
        has_outliers: True where single examples are asked for.
        ingredients: what must be computed.
    """

    spelled: str
    columns: tuple[str, ...]
    sketches: tuple[str, ...]
    has_outliers: bool
    ingredients: frozenset[str]

    @classmethod
    def of(cls, statistics: Statistics) -> "Selection":
        """Take a selection apart.

        Raises:
            ValueError: as `spelled`.

        Example:
            >>> Selection.of("light,outliers").has_outliers
            True
        """
        return cls(
            spelled(statistics),
            columns(statistics),
            sketches(statistics),
            "outliers" in selected(statistics),
            ingredients(statistics),
        )
