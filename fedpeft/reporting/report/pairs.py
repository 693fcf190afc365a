"""Paired tests over the seeds that two settings share, corrected for their number."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from fedpeft.reporting.report.settings import Runs, Setting
from fedpeft.reporting.tables import Rows

FEWEST = 3  # pairs of a test
LEVEL = 0.95  # level of confidence intervals
# Keys that must be equal, beside the partition's; one more counts for clients' rows.
SAME = ("num_clients", "data.max_answer_length", "data.cut_references")
SAME_FOR_CLIENTS = (*SAME, "evaluation.max_client_rows")
PARTITION = "partition_sha256"  # key of a summary; null where sites hold rows of their own
UNKNOWN = "unknown"


def paired_tests(runs: Runs, key: str) -> tuple[Rows, dict[str, list[str]]]:
    """Test each pair of settings for a difference of the measure.

    Args:
        runs: the report's runs.
        key: ``quality`` for the clients' own test rows, ``global_test`` for the server's.

    Returns:
        A row for each pair that has enough common seeds of the same rows by client, the smallest
        p first, with Holm's correction in ``p_holm``; and the other pairs by the reason why they
        have no test.
    """
    rows: Rows = []
    untested: dict[str, list[str]] = {}
    for one, other in combinations(runs.settings, 2):
        differences, why = _differences(one, other, key)
        if why:
            untested.setdefault(why, []).append(f"{one.name} and {other.name}")
        else:
            rows.append({"a": one.name, "b": other.name} | t_test(differences))
    corrected = holm([row["p"] for row in rows])
    rows = [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]
    return sorted(rows, key=lambda row: row["p"]), untested


def _differences(one: Setting, other: Setting, key: str) -> tuple[list[float], str]:
    """Return the differences by common seed, or the reason why no test is made of them."""
    if missing := [setting.name for setting in (one, other) if not setting.values(key)]:
        return [], f"{missing[0]} was not measured on these rows"
    a, b = _divided(one, key), _divided(other, key)
    if unequal := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        return [], f"they differ in {', '.join(unequal)}, so a seed makes no pair"
    common = [seed for seed in one.seeds if seed in other.seeds]
    rows = [(_rows(one, seed), _rows(other, seed)) for seed in common]
    if any(UNKNOWN in (*a, *b) for a, b in rows):
        return [], "sites hold rows of their own, so nobody knows that both had the same rows"
    same = [seed for seed, (a, b) in zip(common, rows, strict=True) if a == b]
    pairs = [(_quality(one, seed, key), _quality(other, seed, key)) for seed in same]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if len(differences) < FEWEST:
        return [], (
            f"a test needs {FEWEST} common seeds of the same rows by client, got {len(differences)}"
        )
    if np.ptp(differences) <= 1e-12 * max(map(abs, differences)):
        return [], f"the same difference, {differences[0]:.3f}, with every seed, so no test applies"
    return differences, ""


def _divided(setting: Setting, key: str) -> dict[str, Any]:
    """Return the keys that divide the rows, and that say what of them is measured."""
    values = setting.runs[0].settings
    keys = SAME if key == "global_test" else SAME_FOR_CLIENTS
    return {k: v for k, v in values.items() if k in keys or k.startswith("partition.")}


def _rows(setting: Setting, seed: int) -> tuple[str | None, str | None]:
    """Return the hashes of a run's data and of who holds which rows.

    The second is null for a run of an earlier version, which did not save it, so that the keys of
    the partition alone tell whether clients had the same rows.
    """
    summary = setting.runs[setting.seeds.index(seed)].final_summary
    partition = (summary[PARTITION] or UNKNOWN) if PARTITION in summary else None
    return summary.get("data", {}).get("sha256"), partition


def unsaved_partitions(runs: Runs) -> int:
    """Return the number of runs that did not save who holds which rows."""
    summaries = [run.final_summary for setting in runs.settings for run in setting.runs]
    return sum(PARTITION not in summary for summary in summaries)


def _quality(setting: Setting, seed: int, key: str) -> float | None:
    return setting.rows[setting.seeds.index(seed)][key]


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
