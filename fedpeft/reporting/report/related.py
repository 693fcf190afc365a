"""Charts of diagnostics against quality, a point a run."""

from collections.abc import Iterator
from statistics import mean

from fedpeft.reporting.report.chart import ScatterChart
from fedpeft.reporting.report.diagnostics import WITH_QUALITY, over_rounds
from fedpeft.reporting.report.settings import ROWS, Runs
from fedpeft.reporting.report.table import p_text

FEWEST = 10  # settings of a correlation: with fewer, p of the approximation means nothing
DIGITS = 4  # digits of a diagnostic; interference that is rounding alone counts as 0
TIED = 9  # digits by which two settings' means are equal


def related_charts(runs: Runs) -> Iterator[ScatterChart]:
    """Return a chart for each diagnostic that differs between runs."""
    for key, diagnostic in WITH_QUALITY.items():
        points = _points(runs, key, runs.compared)
        if len({x for of_setting in points for x, _ in of_setting}) < 2:
            continue
        drawn = [place for place, of_setting in enumerate(points) if of_setting]
        yield ScatterChart(
            diagnostic.beside,
            f"{runs.title.capitalize()} and {diagnostic.name}",
            f"{diagnostic.name}, mean over the rounds",
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
    both = f"{runs.title} and {WITH_QUALITY[key].name}"
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
