"""How often the intervals of `stats_core/intervals.py` hold the truth.

``python -m benchmarks.coverage`` prints the tables of ``docs/intervals.md``; ``--write`` puts them there.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.simulation import (
    BATCHES,
    BLOCKS,
    MODELS,
    SEED,
    SERIAL_BATCH,
    SERIAL_LENGTHS,
    STRENGTHS,
    WIDE_MODELS,
    WINDOW,
    Share,
    check_sums,
    falling_signal,
    one_step,
    pooled,
    reused_examples,
    token_means,
    variance_ratio,
    wandering_signal,
)

PAGE = Path(__file__).parents[1] / "docs/intervals.md"
BEGIN, END = "<!-- begin: python -m benchmarks.coverage --write -->", "<!-- end -->"


class Results(NamedTuple):
    """Everything that was counted, by model and batch (or by case)."""

    pooled: dict[tuple[str, int], dict[tuple[int, float], Share]]
    one_step: dict[tuple[str, int], dict[float, Share]]
    ratio: dict[tuple[str, int], dict[int, Share]]
    serial: dict[str, dict[tuple[int, int], Share]]


POOLED_LENGTHS = (8, 16, 32)
PAIRS = (16, 32, 64, 128)
RATIO_BATCHES = (8, 32)


def measured(repetitions: int, *, serial: bool = True) -> Results:
    """All cells. Windows of 32 steps: ``repetitions`` for each cell up to B = 32, half of it at 128."""
    check_sums()
    rng = np.random.default_rng(SEED)

    def count(batch: int) -> int:
        return repetitions if batch <= 32 else repetitions // 2

    cells = [(model, batch) for batch in BATCHES for model in MODELS]
    results = Results(
        {(m.name, b): pooled(rng, m, b, count(b), POOLED_LENGTHS) for m, b in cells},
        {(m.name, b): one_step(rng, m, b, count(b)) for m, b in cells},
        {(m.name, b): variance_ratio(rng, m, b, repetitions // 8, PAIRS) for b in RATIO_BATCHES for m in WIDE_MODELS},
        {},
    )
    for batch in (16, 64):
        results.one_step["1/j, token means", batch] = token_means(rng, batch, repetitions)
    if serial:
        steps = repetitions // 4 * max(SERIAL_LENGTHS)
        results.serial["fresh examples in every step"] = reused_examples(rng, 1, steps)
        for uses in (2, 4, 8):
            results.serial[f"each example in {uses} consecutive steps"] = reused_examples(rng, uses, steps)
        for memory in (0.5, 0.9):
            long_run, own = wandering_signal(rng, memory, steps)
            results.serial[f"\\|G\\|² wanders, memory {memory}; held: its long-run mean"] = long_run
            results.serial[f"\\|G\\|² wanders, memory {memory}; held: the window's mean"] = own
        results.serial["\\|G\\|² falls to a quarter; held: the window's mean"] = falling_signal(rng, steps)
    return results


def misses(results: Results, deviations: float = 0.0) -> list[str]:
    """Cells outside what is promised, by more than so many binomial standard deviations at the bound."""
    found = []

    def check(what: str, share: float, low: float, high: float, count: int) -> None:
        for bound, sign in ((low, 1), (high, -1)):
            slack = deviations * np.sqrt(bound * (1 - bound) / count)
            if sign * (share - bound) < -slack:
                found.append(f"{what}: {share:.3f} of {count}, promised {low} to {high}")

    for (name, batch), cells in results.pooled.items():
        for (steps, strength), share in cells.items():
            if steps != WINDOW:
                continue
            what = f"{name}, B = {batch}, strength {strength}"
            check(what, share.covered, 0.90, 0.98, share.count)
            if strength == 0:
                check(f"{what}: unresolved", share.unresolved, 0.95, 1, share.count)
            if strength >= 1:
                check(f"{what}: unresolved", share.unresolved, 0, 0.05, share.count)
    for (name, batch), singles in results.one_step.items():
        for strength, share in singles.items():
            check(f"one step: {name}, B = {batch}, strength {strength}", share.covered, 0.90, 1, share.count)
    for (name, batch), ratios in results.ratio.items():
        for pairs, share in ratios.items():
            check(f"ratio: {name}, B = {batch}, {pairs} pairs", share.covered, 0.88, 0.98, share.count)
    return found


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def _percent(*shares: float) -> str:
    ends = [f"{100 * end:.1f}" for end in (min(shares), max(shares))]
    return ends[0] if len(shares) == 1 else " – ".join(ends)


def _fold(ratio: float) -> str:
    return f"{ratio:.1f}" if np.isfinite(ratio) else "∞"


def _summary(results: Results) -> str:
    shares = [(cells[WINDOW, s], s) for cells in results.pooled.values() for s in STRENGTHS]
    rows = [
        [f"window of {WINDOW} steps, SNR and so B_simple", "90 – 98", _percent(*(x.covered for x, _ in shares))],
        ["not resolved where there is no signal", "≥ 95", _percent(*(x.unresolved for x, s in shares if s == 0))],
        ["not resolved at B\\|G\\|²/trΣ ≥ 1", "≤ 5", _percent(*(x.unresolved for x, s in shares if s >= 1))],
        ["one step", "≥ 90", _percent(*(x.covered for cells in results.one_step.values() for x in cells.values()))],
        ["ρ, T ≥ 16, r_eff ≥ 20", "88 – 98",
         _percent(*(x.covered for cells in results.ratio.values() for x in cells.values()))],
    ]  # fmt: skip
    return _table("What is promised, and the lowest and highest found, in %", ["interval", "promised", "found"], rows)


def tables(results: Results) -> str:
    """The tables of the page."""
    strengths = [f"{s:g}" for s in STRENGTHS]
    counts = {b: cells[WINDOW, 1.0].count for (_, b), cells in results.pooled.items()}
    drawn_windows = ", ".join(f"{n} windows at B = {b}" for b, n in counts.items())
    pairs = ", ".join(f"{s.count} at T = {t}" for t, s in next(iter(results.ratio.values())).items())
    every = [(b, s) for b in BATCHES for s in STRENGTHS]
    parts = [
        _summary(results),
        _table(
            f"A window of {WINDOW} steps: how often the 95 % interval holds the truth, in %, by B\\|G\\|²/trΣ; "
            f"{drawn_windows}",
            ["noise", "B", *strengths],
            [
                [name, f"{batch}", *(_percent(cells[WINDOW, s].covered) for s in STRENGTHS)]
                for (name, batch), cells in results.pooled.items()
            ],
        ),
        _table(
            "The same windows: how often B_simple is *not resolved*, in %, by B\\|G\\|²/trΣ",
            ["noise", "B", *strengths],
            [
                [name, f"{batch}", *(_percent(cells[WINDOW, s].unresolved) for s in STRENGTHS)]
                for (name, batch), cells in results.pooled.items()
            ],
        ),
        _table(
            f"How wide, a window of {WINDOW} steps: upper over lower end of B_simple, the median window, by "
            "B\\|G\\|²/trΣ, at B = 8 · 32 · 128",
            ["noise", *strengths[1:]],
            [
                [model.name, *(" · ".join(_fold(results.pooled[model.name, b][WINDOW, s].fold) for b in BATCHES)
                               for s in STRENGTHS[1:])]
                for model in MODELS
            ],
        ),
        _table(
            "Windows of K steps: lowest and highest coverage over all B and B\\|G\\|²/trΣ, in %; highest share not "
            "resolved at B\\|G\\|²/trΣ = 1, in %",
            ["noise", *(f"K = {k}" for k in POOLED_LENGTHS), *(f"not resolved, K = {k}" for k in POOLED_LENGTHS)],
            [
                [
                    model.name,
                    *(_percent(*(results.pooled[model.name, b][k, s].covered for b, s in every))
                      for k in POOLED_LENGTHS),
                    *(_percent(max(results.pooled[model.name, b][k, 1.0].unresolved for b in BATCHES))
                      for k in POOLED_LENGTHS),
                ]
                for model in MODELS
            ],
        ),
        _table(
            "One step: how often the 95 % interval holds the truth, and (in brackets) is not resolved, in %, by "
            "\\|G\\|²/Var(ḡ)",
            ["noise", "B", *strengths],
            [
                [name, f"{batch}", *(f"{_percent(c[s].covered)} ({_percent(c[s].unresolved)})" for s in STRENGTHS)]
                for (name, batch), c in results.one_step.items()
            ],
        ),
        _table(
            f"ρ over T pairs of steps: how often its 95 % interval holds 1, in %; {pairs}",
            ["noise", "r_eff", "B", *(f"T = {t}" for t in PAIRS)],
            [
                [model.name, f"{model.effective_rank:.0f}", f"{batch}",
                 *(_percent(results.ratio[model.name, batch][t].covered) for t in PAIRS)]
                for batch in RATIO_BATCHES
                for model in WIDE_MODELS
            ],
        ),
    ]  # fmt: skip
    parts += [
        _table(
            f"Steps that correlate, a window of {steps} of them: how often the 95 % interval for SNR holds the truth, "
            f"in %, by block; Λ ~ 1/j, B = {SERIAL_BATCH}",
            ["steps", *(f"block = {b}" for b in BLOCKS)],
            [[name, *(_percent(cells[steps, b].covered) for b in BLOCKS)] for name, cells in results.serial.items()],
        )
        for steps in (SERIAL_LENGTHS if results.serial else ())
    ]
    return "\n\n".join(parts)


def written(page: str, content: str) -> str:
    """The page with the content between its two markers."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=8000, help="windows a cell up to B = 32; half at 128")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/intervals.md")
    arguments = parser.parse_args()
    start = time.perf_counter()
    results = measured(arguments.repetitions)
    content = tables(results)
    print(content)
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(), content))
    for miss in misses(results):
        print("MISSED", miss)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
