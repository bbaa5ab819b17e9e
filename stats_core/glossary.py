"""The glossary in the docs, written from the catalogue, so that it never says something else.

``python -m gradiometer.stats_core.glossary`` prints it; ``make docs`` puts it where it belongs.
"""

import sys

from gradiometer.stats_core import catalog
from gradiometer.stats_core.rows import INGREDIENTS

__all__ = ["glossary"]

_KINDS = {
    "sum": "sum over the layer's elements; travels",
    "mean": "mean over the layer's elements; travels",
    "count": "the same for all layers, or the largest of them; travels",
    "example": "made of the examples' own numbers; travels, for each layer and for the whole model",
    "histogram": "log-bucketed counts, merged exactly; travels",
    "outliers": "single examples; travels",
    "ratio": "ratio of two sums over a window of steps; formed where it is read",
    "formula": "formed from sums over a window of steps where it is read",
}
_SYMBOLS = (
    "Symbols: gᵢ gradient of example i's own loss, wᵢ its share of the loss (Σwᵢ = 1), "
    "ḡ = Σwᵢgᵢ the batch gradient, n examples, aᵢ raw weights, s₂ = Σwᵢ², M₂ = Σaᵢ(gᵢ − ḡ)², t the step, "
    "u and s MaxVA's mean and variance through time, q the newest gradient's weight, σ̂² = M₂/(n − 1), "
    "tⱼ² = n ḡⱼ²/σ̂ⱼ², ḡ₋ᵢ the mean without example i, m̂ and v̂ Adam's moments, η the learning rate, L the loss. "
    "Sums run over the elements of a layer."
)
_TIERS = (
    "Tiers: `light` holds norms and their sums, `default` what mean and variance give beside them, `full` what costs "
    "more (directions, signs, distributions, views of the optimizer). `statistics=` takes a tier, names, or both: "
    '`["default", "conflicting_share"]`. What is in no tier is measured only where it is asked for by name.'
)


def glossary() -> str:
    """The glossary as Markdown.

    Example:
        >>> print(glossary().splitlines()[0])
        # Glossary
    """
    lines = [
        "# Glossary",
        "",
        "Generated from `stats_core/catalog.py` by `make docs`; change it there.",
        "",
        _SYMBOLS,
        "",
        _TIERS,
        "",
        "## Statistics of a layer",
        "",
        "| name | symbol | unit | meaning | formula | made of | tier | how it adds up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in catalog.STATISTICS:
        kind = _KINDS[row.kind] + ("; with a 95 % interval" if row.interval else "")
        made_of = ", ".join(f"`{need}`" for need in row.needs)
        cells = (
            f"`{row.name}`",
            _cell(row.symbol),
            row.unit,
            row.help,
            _cell(row.formula),
            made_of,
            row.tier or "–",
            kind,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What measuring may need", "", "| ingredient | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in INGREDIENTS.items()]
    lines += ["", "## Numbers of a step", "", "| name | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {row.unit} | {row.help} |" for row in catalog.SCALARS]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(glossary())
