"""The diagnostics of rounds that a report draws; a further one is an entry of ``DIAGNOSTICS``."""

from statistics import mean
from typing import NamedTuple

from fedpeft.reporting.report.series import in_lines
from fedpeft.reporting.saved_runs import SavedRun


class Diagnostic(NamedTuple):
    """A diagnostic of rounds, drawn by round.

    Attributes:
        chart: name of the chart.
        title: title of the chart.
        axis: the diagnostic's name on the chart's axis.
        meaning: one sentence that explains the diagnostic.
        lacking: ends the sentence "no round ..." on a setting that is not drawn.
        beside: name of the chart that has quality beside it, a point a run; empty if there is none,
            then the table of diagnostics has no column of it either.
        name: the diagnostic's name in the chart ``beside`` and in the table.
    """

    chart: str
    title: str
    axis: str
    meaning: str
    lacking: str
    beside: str = ""
    name: str = ""


DIAGNOSTICS = {  # diagnostics by the key of a round's line
    "interference": Diagnostic(
        chart="interference",
        title="Interference by round",
        axis="interference",
        meaning="Interference: distance of the aggregate's matrices from the mean of the clients' "
        "matrices, as a share of how far this mean moved; 0: the aggregation is exact. Rounds "
        "without an evaluation have none.",
        lacking="had it (a factor stays on the client, or there are no factors)",
        beside="interference_and_quality",
        name="interference",
    ),
    "update_cosine": Diagnostic(
        chart="drift",
        title="Agreement of the clients' updates",
        axis="mean cosine",
        meaning="Mean cosine of two clients' updates in a round; the smaller, the more clients "
        "drift apart.",
        lacking="had updates of two clients",
        beside="drift_and_quality",
        name="cosine of two clients' updates",
    ),
    "update_norm_mean": Diagnostic(
        chart="update_norms",
        title="Update norm by round",
        axis="mean norm of an update",
        meaning="Mean norm of the clients' updates of what is shared, in one round.",
        lacking="had a shared update",
    ),
}
WITH_QUALITY = {key: diagnostic for key, diagnostic in DIAGNOSTICS.items() if diagnostic.beside}


def over_rounds(run: SavedRun, key: str) -> float | None:
    """Return the mean over the rounds of a run's diagnostic.

    It is null if no round has it, and where no two clients train, whose interference of 0 would
    count as an exact aggregation: ``strategy=centralized`` averages nothing.
    """
    values = in_lines(key)(run).values()
    return mean(values) if values and in_lines("update_cosine")(run) else None
