"""The glossary in the docs, written from the catalogue, so that it never says something else.

``python -m gradiometer.stats_core.glossary`` prints it; ``make docs`` puts it where it belongs.
"""

import sys

from gradiometer.stats_core import catalog

__all__ = ["glossary"]

_KINDS = {
    "sum": "sum over the layer's elements; travels",
    "mean": "mean over the layer's elements; travels",
    "count": "the same for all layers; travels",
    "ratio": "ratio of two sums over a window of steps; formed where it is read",
}
_SYMBOLS = (
    "Symbols: gᵢ gradient of example i's own loss, wᵢ its share of the loss (Σwᵢ = 1), "
    "ḡ = Σwᵢgᵢ the batch gradient, n examples, aᵢ raw weights, s₂ = Σwᵢ², M₂ = Σaᵢ(gᵢ − ḡ)², t the step, "
    "u and s MaxVA's mean and variance through time. Sums run over the elements of a layer."
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
        "## Statistics of a layer",
        "",
        "| name | symbol | unit | meaning | formula | tier | how it adds up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in catalog.STATISTICS:
        cells = (f"`{row.name}`", _cell(row.symbol), row.unit, row.help, _cell(row.formula), row.tier, _KINDS[row.kind])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Numbers of a step", "", "| name | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {row.unit} | {row.help} |" for row in catalog.SCALARS]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(glossary())
