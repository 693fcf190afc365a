"""Charts of diagnostics against quality, a point a run."""

from collections.abc import Iterator
from statistics import mean
from typing import NamedTuple

from fedpeft.reporting.report.chart import ScatterChart
from fedpeft.reporting.report.series import in_lines
from fedpeft.reporting.report.settings import ROWS, Runs
from fedpeft.reporting.report.table import p_text
from fedpeft.reporting.saved_runs import SavedRun

FEWEST = 10  # settings of a correlation: with fewer, p of the approximation means nothing
DIGITS = 4  # of a diagnostic; an exact aggregation's interference is rounding, and counts as 0
TIED = 9  # digits by which two settings' means are equal


class Diagnostic(NamedTuple):
    """A diagnostic of rounds.

    Attributes:
        chart: name of the chart that has quality beside it.
        axis: its name on axes and in tables.
        meaning: one sentence.
    """

    chart: str
    axis: str
    meaning: str


DIAGNOSTICS = {  # by key of a round's line
    "interference": Diagnostic(
        "interference_and_quality",
        "interference",
        "Interference: distance of the aggregate's matrices from the mean of the clients' "
        "matrices, as a share of how far this mean moved; 0: the aggregation is exact. Rounds "
        "without an evaluation have none.",
    ),
    "update_cosine": Diagnostic(
        "drift_and_quality",
        "cosine of two clients' updates",
        "Mean cosine of two clients' updates in a round; the smaller, the more clients drift "
        "apart.",
    ),
}


def related_charts(runs: Runs) -> Iterator[ScatterChart]:
    """Return a chart for each diagnostic that differs between runs."""
    for key, (name, axis, _) in DIAGNOSTICS.items():
        points = _points(runs, key, runs.compared)
        if len({x for of_setting in points for x, _ in of_setting}) < 2:
            continue
        drawn = [place for place, of_setting in enumerate(points) if of_setting]
        yield ScatterChart(
            name,
            f"{runs.title.capitalize()} and {axis}",
            f"{axis}, mean over the rounds",
            f"{runs.title} on {ROWS[runs.compared]}",
            [runs.settings[place].name for place in drawn],
            drawn,
            [points[place] for place in drawn],
            notes=["Each point is a run, after its last round.", correlation(runs, key)],
        )


def correlation(runs: Runs, key: str) -> str:
    """Say how a diagnostic goes together with the measure on each kind of test rows.

    Seeds of a setting are no further evidence, so the means over them are correlated.
    """
    from scipy.stats import spearmanr  # takes a second to import

    found: list[str] = []
    for measured, rows in ROWS.items():
        means = [  # rounded, because sums of the same values in another order are a tie
            tuple(round(mean(values), TIED) for values in zip(*points, strict=True))
            for points in _points(runs, key, measured)
            if points
        ]
        if len(means) >= FEWEST and all(len({m[axis] for m in means}) > 1 for axis in (0, 1)):
            rho, p = map(float, spearmanr(means))
            found.append(f"{rho:+.2f} on {rows} (p {p_text(p)}, {len(means)} settings)")
    both = f"{runs.title} and {DIAGNOSTICS[key].axis}"
    if not found:
        return f"A rank correlation of {both} needs {FEWEST} settings, and values that differ."
    return (
        f"Spearman's rank correlation of {both}, each the mean of a setting's seeds: "
        f"{'; '.join(found)}. Settings of one method are alike, so p is too small; and a "
        "correlation does not say which is the cause."
    )


def _points(runs: Runs, key: str, measured: str) -> list[list[tuple[float, float]]]:
    """Return by setting (mean of the diagnostic over the rounds, measure) of runs with both."""
    return [
        [
            (round(value, DIGITS), row[measured])
            for run, row in zip(setting.runs, setting.rows, strict=True)
            if (value := over_rounds(run, key)) is not None and row[measured] is not None
        ]
        for setting in runs.settings
    ]


def over_rounds(run: SavedRun, key: str) -> float | None:
    """Return the mean over the rounds of a run's diagnostic.

    It is null if no round has it, and where no two clients train, whose interference of 0 would
    count as an exact aggregation: ``strategy=centralized`` averages nothing.
    """
    values = in_lines(key)(run).values()
    return mean(values) if values and in_lines("update_cosine")(run) else None
