"""Numbers of studies: one row a run, chosen learning rates, and means over seeds."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedpeft.reporting.observer import UNWEIGHTED, WORST
from fedpeft.reporting.study import Done, Outcome
from fedpeft.reporting.tables import Rows

VALUES = (
    "quality",
    "quality_unweighted",
    "quality_worst",
    "validation",
    "trained",
    "bytes",
    "seconds",
    "failed",
)


class Measures(NamedTuple):
    """Names of the measures.

    Attributes:
        quality: the measure on test rows by which methods are compared.
        selects: the measure on validation rows that chooses.
        sign: 1 if more of ``selects`` is better, -1 if less.
    """

    quality: str
    selects: str
    sign: int

    def missing(self, outcome: Outcome, searched: bool) -> str:
        """Return the reason why an outcome is no result of all clients; empty if it is one.

        Args:
            outcome: a run's summary, or the error that ended it.
            searched: true if the run takes part in the choice of a learning rate.
        """
        if isinstance(outcome, Exception):
            return " ".join(str(outcome).split()) or repr(outcome)
        final = outcome["final"]
        for why in outcome["refused"].get(str(final["round"]), {}).values():
            if "evaluation: " in why:
                return why
        keys = [f"client_test_{self.quality}"]
        keys += [f"client_validation_{self.selects}"] if searched else []
        return next((f"{key} was not measured" for key in keys if key not in final), "")


def run_rows(done: Sequence[Done], measures: Measures) -> Rows:
    """Return the rows of ``runs.csv``, one a run."""
    rates: dict[str, set[float]] = {}
    for run, _ in done:
        rates.setdefault(run.entry, set()).add(run.lr)
    return [_run_row(one, measures, len(rates[one.run.entry]) > 1) for one in done]


def _run_row(one: Done, measures: Measures, searched: bool) -> dict[str, Any]:
    run, outcome = one
    row = {"method": run.entry, "lr": run.lr, "seed": run.seed} | dict.fromkeys(VALUES)
    why = measures.missing(outcome, searched)
    if why or isinstance(outcome, Exception):
        return row | {"failed": why}
    final, size = outcome["final"], outcome["bytes"]
    return row | {
        "quality": final[f"client_test_{measures.quality}"],
        "quality_unweighted": final.get(f"client_test_{measures.quality}{UNWEIGHTED}"),
        "quality_worst": final.get(f"client_test_{measures.quality}{WORST}"),
        "validation": final.get(f"client_validation_{measures.selects}"),
        "trained": outcome["parameters"]["trained"][1],
        "bytes": size["uplink_bytes"] + size["downlink_bytes"],
        "seconds": outcome["seconds"],
    }


def chosen_lr(rows: Rows, sign: int) -> float | None:
    """Choose a method's learning rate by the mean over its seeds on validation rows.

    A rate at which more seeds came to their end goes first, because a mean over the survivors says
    nothing of the other seeds. Among equals, the smaller rate goes first.

    Args:
        rows: the method's rows of ``runs.csv``.
        sign: 1 if more is better, -1 if less.

    Returns:
        The learning rate, or None if every run failed.
    """
    by_lr: dict[float, list[Any]] = {}
    for row in rows:
        if row["failed"] is None:
            by_lr.setdefault(row["lr"], []).append(row["validation"])
    if len(by_lr) == 1:
        return next(iter(by_lr))

    def rank(lr: float) -> tuple[int, float, float]:
        return len(by_lr[lr]), sign * mean(by_lr[lr]), -lr

    return max(by_lr, key=rank, default=None)


def study_row(rows: Rows, sign: int) -> dict[str, Any]:
    """Sum up a method at its chosen learning rate.

    Args:
        rows: the method's rows of ``runs.csv``.
        sign: 1 if more of the measure that chooses is better, -1 if less.

    Returns:
        Mean and sample standard deviation of the quality, over ``seeds`` of ``of`` seeds; mean of
        the bytes. They are None if every run failed.
    """
    lr, grid = chosen_lr(rows, sign), {row["lr"] for row in rows}
    ended = [row for row in rows if row["lr"] == lr and row["failed"] is None]
    quality = [row["quality"] for row in ended]
    return {
        "method": rows[0]["method"],
        "lr": lr,
        "edge": len(grid) > 1 and lr in (min(grid), max(grid)),
        "quality": mean(quality) if quality else None,
        "sd": stdev(quality) if len(quality) > 1 else None,
        "seeds": len(ended),
        "of": len({row["seed"] for row in rows}),
        "trained": max((row["trained"] for row in ended), default=None),
        "bytes": mean(row["bytes"] for row in ended) if ended else None,
    }


def baseline(done: Sequence[Done]) -> float | None:
    """Return the score of a client's commonest label on its own test rows, mean over seeds."""
    by_seed: dict[int, float] = {}
    for run, outcome in done:
        if isinstance(outcome, dict) and "client_test_baseline" in outcome["baseline"]:
            by_seed.setdefault(run.seed, outcome["baseline"]["client_test_baseline"])
    return mean(by_seed.values()) if by_seed else None
