"""Charts of diagnostics against quality, a point a run."""

from collections.abc import Iterator
from statistics import mean
from typing import NamedTuple

from fedpeft.reporting.report.chart import ScatterChart
from fedpeft.reporting.report.series import in_lines
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.saved_runs import SavedRun

FEWEST = 10  # settings of a correlation: with fewer, p of the approximation means nothing
DIGITS = 4  # of a diagnostic; an exact aggregation's interference is rounding, and counts as 0


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
        "matrices, as a share of how far this mean moved; 0: the aggregation is exact. Only rounds "
        "that measure have it.",
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
        points = [_points(runs, place, key) for place in range(len(runs.settings))]
        if len({x for of_setting in points for x, _ in of_setting}) < 2:
            continue
        drawn = [place for place, of_setting in enumerate(points) if of_setting]
        where = "clients' test rows" if runs.compared == "quality" else "the data's test rows"
        yield ScatterChart(
            name,
            f"{runs.title.capitalize()} and {axis}",
            f"{axis}, mean over the rounds",
            f"{runs.title} on {where}",
            [runs.settings[place].name for place in drawn],
            drawn,
            [points[place] for place in drawn],
            notes=["Each point is a run, after its last round.", _correlation(points)],
        )


def _points(runs: Runs, place: int, key: str) -> list[tuple[float, float]]:
    """Return (mean of the diagnostic over the rounds, quality) of each run that has both."""
    setting = runs.settings[place]
    points: list[tuple[float, float]] = []
    for run, row in zip(setting.runs, setting.rows, strict=True):
        value, quality = over_rounds(run, key), row[runs.compared]
        if value is not None and quality is not None:
            points.append((round(value, DIGITS), quality))
    return points


def over_rounds(run: SavedRun, key: str) -> float | None:
    """Return the mean over the rounds of a run's diagnostic; null if no round has it."""
    values = in_lines(key)(run).values()
    return mean(values) if values else None


def _correlation(points: list[list[tuple[float, float]]]) -> str:
    """Say how the settings' means over seeds go together.

    Seeds of one setting are no further evidence, so they count once.
    """
    from scipy.stats import spearmanr  # takes a second to import

    means = [tuple(map(mean, zip(*p, strict=True))) for p in points if p]
    if len(means) < FEWEST or any(len({m[axis] for m in means}) < 2 for axis in (0, 1)):
        return f"A rank correlation needs {FEWEST} settings, and values that differ."
    rho, p = spearmanr(means)
    return (
        f"Spearman's rank correlation of the {len(means)} settings, each the mean of its seeds: "
        f"{rho:.2f} (p = {p:.3f}). Settings of one method are alike, so p is too small; and a "
        "correlation does not say which is the cause."
    )
