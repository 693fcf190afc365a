"""Values by round: mean and spread over the seeds of a setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedpeft.reporting.report.settings import Setting
from fedpeft.reporting.results import mean_and_sd
from fedpeft.reporting.saved_runs import SavedRun

Points = dict[int, float]  # values by round


@dataclass(frozen=True)
class Curve:
    """A setting's values by round, over the seeds.

    Args:
        rounds: numbers of the rounds that every seed has.
        means: means over the seeds, by round.
        sds: sample standard deviations, by round; null with one seed.
    """

    rounds: Sequence[int]
    means: Sequence[float]
    sds: Sequence[float | None]

    @classmethod
    def of(cls, setting: Setting, points: Callable[[SavedRun], Points]) -> "Curve":
        """Sum up a setting's runs; a round that one seed lacks is left out.

        Args:
            setting: gives the runs.
            points: gives a run's values by round.
        """
        by_run = [points(run) for run in setting.runs]
        rounds = sorted(set.intersection(*(set(one) for one in by_run)))
        pairs = [mean_and_sd([one[number] for one in by_run]) for number in rounds]
        return cls(rounds, [mean or 0.0 for mean, _ in pairs], [sd for _, sd in pairs])

    @property
    def low(self) -> list[float] | None:
        """Mean less standard deviation; null with one seed."""
        return self._shifted(-1)

    @property
    def high(self) -> list[float] | None:
        """Mean plus standard deviation; null with one seed."""
        return self._shifted(1)

    def _shifted(self, sign: int) -> list[float] | None:
        if not self.sds or None in self.sds:
            return None
        return [m + sign * (sd or 0.0) for m, sd in zip(self.means, self.sds, strict=True)]


def in_lines(key: str) -> Callable[[SavedRun], Points]:
    """Return a function that gives a value of a run's lines by round, where there is one."""
    return lambda run: {line["round"]: line[key] for line in run.lines if line.get(key) is not None}


def megabytes(run: SavedRun) -> Points:
    """Return the megabytes of training's messages up to each round, all clients, both ways."""
    sent = [_bytes(line) / 1e6 for line in run.lines]
    return dict(zip([line["round"] for line in run.lines], accumulate(sent), strict=True))


def _bytes(line: Mapping[str, Any]) -> int:
    return line.get("uplink_bytes", 0) + line.get("downlink_bytes", 0)


def summed(key: str) -> Callable[[SavedRun], Points]:
    """Return a function that gives the sum of a value of a run's lines up to each round."""

    def points(run: SavedRun) -> Points:
        values = in_lines(key)(run)
        return dict(zip(values, accumulate(values.values()), strict=True))

    return points
