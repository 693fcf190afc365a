"""The comparison's numbers, out of the lines of its runs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from comparison_run import BOUNDS, DATA_SETS, GRID

Line = dict[str, Any]

REFERENCE, SHARE = "lora", 0.95
BASELINE = "(commonest label)"


class Result(NamedTuple):
    """What there is to show.

    Args:
        found: every run's line.
        chosen: the methods' learning rates; None where training diverged at all of them.
        aliases: names of the same configuration, by the one that was run.
    """

    found: list[Line]
    chosen: dict[str, float | None]
    aliases: dict[str, list[str]]

    def runs(self, method: str, data: str) -> list[Line]:
        """A method's at its chosen learning rate."""
        key = (method, data, self.chosen.get(method))
        return [line for line in self.found if (line["method"], line["data"], line["lr"]) == key]

    def label(self, method: str) -> str:
        """Its name and those of the same configuration."""
        return " = ".join([method, *self.aliases.get(method, [])])

    def edge(self, method: str) -> str:
        """Says if a learning rate beyond the grid might have been better."""
        return " (edge)" if self.chosen.get(method) in (min(GRID), max(GRID)) else ""


class Row(NamedTuple):
    """A method on a data set, over those of its runs that did not diverge.

    Args:
        quality: mean on the clients' own test rows; ``quality_sd`` is the sample's deviation.
        global_test: mean of the server's model on the test set; None for personal methods.
        trained: least and most parameters in a round.
        bytes: mean of training in both directions, all clients.
        bytes_to_goal: median over the ``reached`` runs that come up to LoRA's share.
    """

    data: str
    method: str
    lr: float | None
    runs: int
    diverged: int
    quality: float | None
    quality_sd: float | None
    quality_min: float | None
    quality_max: float | None
    global_test: float | None
    trained: tuple[int, int] | None = None
    bytes: float | None = None
    bytes_to_goal: float | None = None
    reached: int | None = None


def rows(result: Result, data: str) -> list[Row]:
    """One a method and one of the commonest label, the best mean quality first."""
    goal = threshold(result, data)
    found = [method_row(result, data, method, goal) for method in result.chosen]
    found += [baseline_row(result, data)]
    return sorted(found, key=lambda row: -1 if row.quality is None else row.quality, reverse=True)


def threshold(result: Result, data: str) -> float | None:
    """The share of LoRA's mean quality that the others are to reach."""
    quality = average(known(result.runs(REFERENCE, data), "quality"))
    return None if quality is None else SHARE * quality


def method_row(result: Result, data: str, method: str, goal: float | None) -> Row:
    """Of all seeds at the chosen learning rate."""
    runs = result.runs(method, data)
    trained = known(runs, "trained")
    row = Row(
        data,
        method,
        result.chosen[method],
        len(runs),
        sum("failed" in line for line in runs),
        *spread(known(runs, "quality")),
        average(known(runs, "global_test")),
        (min(low for low, _ in trained), max(high for _, high in trained)) if trained else None,
    )
    if method in BOUNDS:  # they send nothing, or what no federation would
        return row
    sent = [size["uplink_bytes"] + size["downlink_bytes"] for size in known(runs, "bytes")]
    reached = [
        size for curve in known(runs, "curve") if (size := bytes_to(goal, curve)) is not None
    ]
    to_goal = median(reached) if reached else None
    return row._replace(bytes=average(sent), bytes_to_goal=to_goal, reached=len(reached))


def baseline_row(result: Result, data: str) -> Row:
    """Every client always answers its own commonest label; as each seed divides the rows."""
    runs = [line for method in result.chosen for line in result.runs(method, data)]
    by_seed = {line["seed"]: line["baseline"] for line in runs if "baseline" in line}
    own = spread([found["client_test_baseline"] for found in by_seed.values()])
    whole = average([found["test_baseline"] for found in by_seed.values()])
    return Row(data, BASELINE, None, len(by_seed), 0, *own, whole)


def known(runs: list[Line], key: str) -> list[Any]:
    """What those runs have that have it: a diverged one has nothing."""
    return [line[key] for line in runs if line.get(key) is not None]


def average(values: Sequence[float]) -> float | None:
    """Their mean, if there are any."""
    return mean(values) if values else None


class Spread(NamedTuple):
    """Mean, sample standard deviation, least and most."""

    mean: float | None
    deviation: float | None
    least: float | None
    most: float | None


def spread(values: Sequence[float]) -> Spread:
    """None where there are too few values."""
    deviation = stdev(values) if len(values) > 1 else None
    least, most = min(values, default=None), max(values, default=None)
    return Spread(average(values), deviation, least, most)


def bytes_to(goal: float | None, curve: list[list[float]]) -> float | None:
    """Bytes sent until the first evaluation at which the quality is at least ``goal``.

    Args:
        curve: [round, bytes so far, quality] of each evaluation.
    """
    if goal is None:
        return None
    return next((sent for _, sent, quality in curve if quality >= goal), None)


def write_csv(path: Path, result: Result) -> None:
    """All rows with all digits; parameters that differ by round as least and most."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for data in DATA_SETS:
            for row in rows(result, data):
                span = "" if row.trained is None else "-".join(map(str, sorted(set(row.trained))))
                writer.writerow(row._replace(trained=span))
