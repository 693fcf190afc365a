"""Paired tests over the seeds that two settings share, corrected for their number."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from fedpeft.reporting.report.settings import Runs, Setting
from fedpeft.reporting.tables import Rows

FEWEST = 3  # pairs of a test
LEVEL = 0.95  # of confidence intervals


def paired_tests(runs: Runs) -> tuple[Rows, dict[str, list[str]]]:
    """Test each pair of settings for a difference of its quality.

    Returns:
        A row for each pair that has enough common seeds of the same rows and clients, the smallest
        p first, with Holm's correction in ``p_holm``; and the other pairs by the reason why they
        have no test.
    """
    rows: Rows = []
    untested: dict[str, list[str]] = {}
    for one, other in combinations(runs.settings, 2):
        differences, why = _differences(one, other, runs.compared)
        if why:
            untested.setdefault(why, []).append(f"{one.name} and {other.name}")
        else:
            rows.append({"a": one.name, "b": other.name} | t_test(differences))
    corrected = holm([row["p"] for row in rows])
    rows = [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return sorted(rows, key=lambda row: row["p"]), untested


def _differences(one: Setting, other: Setting, key: str) -> tuple[list[float], str]:
    """Return the differences by common seed, or the reason why no test is made of them."""
    if _clients(one) != _clients(other):
        return [], "their rows are divided differently, so a seed makes no pair"
    pairs = [
        (_facts(one, seed, key), _facts(other, seed, key))
        for seed in one.seeds
        if seed in other.seeds
    ]
    pairs = [(a, b) for a, b in pairs if a[0] == b[0] and None not in (*a, *b)]
    if len(pairs) < FEWEST:
        return [], f"a test needs {FEWEST} common seeds of the same data, got {len(pairs)}"
    differences = [a[1] - b[1] for a, b in pairs]
    if np.ptp(differences) <= 1e-12 * max(map(abs, differences)):
        return [], f"the same difference, {differences[0]:.3f}, with every seed, so no test applies"
    return differences, ""


def _clients(setting: Setting) -> dict[str, Any]:
    """Return the keys that divide the rows."""
    values = setting.runs[0].settings
    return {k: v for k, v in values.items() if k == "num_clients" or k.startswith("partition.")}


def _facts(setting: Setting, seed: int, key: str) -> tuple[str | None, Any]:
    """Return the hash of a run's data, and its quality."""
    place = setting.seeds.index(seed)
    data = (setting.runs[place].summary or {}).get("data", {})
    return data.get("sha256"), setting.rows[place][key]


def t_test(differences: Sequence[float]) -> dict[str, Any]:
    """Return the two-sided paired t-test of differences that are not all the same.

    Returns:
        ``n``, the mean ``difference``, its confidence interval from ``low`` to ``high``, and ``p``.
    """
    from scipy import stats  # takes half a second

    result: Any = stats.ttest_1samp(differences, 0.0)
    low, high = result.confidence_interval(LEVEL)
    return {
        "n": len(differences),
        "difference": float(np.mean(differences)),
        "low": float(low),
        "high": float(high),
        "p": float(result.pvalue),
    }


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in their order."""
    corrected = [0.0] * len(values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected
