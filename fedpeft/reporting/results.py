"""Numbers of studies: one row a run, chosen learning rates, and means over seeds."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedpeft.reporting.observer import P10, SPREAD, UNWEIGHTED, WORST
from fedpeft.reporting.study import Done, Outcome
from fedpeft.reporting.tables import Rows

# Begin the names of measures: on the clients' own test rows, on the server's, and on the clients'
# own validation rows.
OWN_TEST, SERVER_TEST, OWN_VALIDATION = "client_test_", "test_", "client_validation_"
FIRST = ("method", "lr", "seed", "chosen")  # columns of runs.csv, then VALUES
VALUES = (
    "quality",
    "quality_unweighted",
    "quality_worst",
    "quality_p10",
    "global_test",
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
        quality_sign: 1 if more of ``quality`` is better, -1 if less.
    """

    quality: str
    selects: str
    sign: int
    quality_sign: int = 1

    def missing(self, outcome: Outcome, searched: bool) -> str:
        """Return the reason why an outcome is no result of all clients; empty if it is one.

        Args:
            outcome: a run's summary, or the error that ended it.
            searched: true if the run takes part in the choice of a learning rate.
        """
        if isinstance(outcome, Exception):
            return " ".join(str(outcome).split()) or repr(outcome)
        if why := unmeasured(outcome):
            return why
        final = outcome["final"]
        keys = [f"{OWN_TEST}{self.quality}"]
        keys += [f"{OWN_VALIDATION}{self.selects}"] if searched else []
        return next((f"{key} was not measured" for key in keys if key not in final), "")


def unmeasured(summary: Mapping[str, Any]) -> str:
    """Return why a client measured nothing after the last round; empty if every client did."""
    refused = summary["refused"].get(str(summary["final"]["round"]), {})
    return next((why for why in refused.values() if "evaluation: " in why), "")


def run_values(summary: Mapping[str, Any], measure: str, selects: str) -> dict[str, Any]:
    """Return a run's numbers by their names in ``VALUES``; null where nothing was measured.

    Args:
        summary: the run's summary.
        measure: the measure on test rows by which methods are compared.
        selects: the measure on validation rows that chooses.
    """
    final, size = summary["final"], summary["bytes"]
    quality = f"{OWN_TEST}{measure}"
    return {
        "quality": final.get(quality),
        "quality_unweighted": final.get(f"{quality}{UNWEIGHTED}"),
        "quality_worst": final.get(f"{quality}{WORST}"),
        "quality_p10": final.get(f"{quality}{P10}"),
        "global_test": final.get(f"{SERVER_TEST}{measure}"),
        "validation": final.get(f"{OWN_VALIDATION}{selects}"),
        "trained": summary["parameters"]["trained"][1],
        "bytes": size["uplink_bytes"] + size["downlink_bytes"],
        "seconds": summary["seconds"],
    }


def further_measures(summary: Mapping[str, Any], measures: Measures) -> dict[str, float]:
    """Return the measures on test rows beside the quality: the clients' and the server's."""
    known = {f"{prefix}{measures.quality}" for prefix in (OWN_TEST, SERVER_TEST)}
    return {
        name: value
        for name, value in summary["final"].items()
        if name.startswith((OWN_TEST, SERVER_TEST))
        and not name.endswith((*SPREAD, "_baseline"))
        and name not in known
    }


def common_label(summary: Mapping[str, Any], quality: float | None) -> float | None:
    """Return the score of always answering the commonest label; null if the task has none.

    Args:
        summary: a run's summary.
        quality: the run's quality; null if no clients were tested, then the server's rows count.
    """
    key = f"{SERVER_TEST if quality is None else OWN_TEST}baseline"
    return summary.get("baseline", {}).get(key)


def headline(summary: Mapping[str, Any]) -> str:
    """Return the measure by which a run is compared; empty if an older run does not say it.

    Older summaries have the server's measures in the order of the task, whose first one counts.
    """
    if "headline" in summary:
        return summary["headline"]
    selected = summary["selected_by"].removeprefix("client_").removeprefix("validation_")
    if selected != "loss":
        return selected
    tested = [key for key in summary["final"] if key.startswith(SERVER_TEST)]
    names = [key.removeprefix(SERVER_TEST) for key in tested]
    named = [name for name in names if name not in ("loss", "token_accuracy")]
    generated = [name for name in named if name.endswith("_generated")]
    return next(iter(generated or named), "")


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation; null where there are too few values."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def comparison_row(
    name: str, summary: Mapping[str, Any], measures: Measures, asked: int
) -> dict[str, Any]:
    """Return a run's row.

    ``quality`` is the mean of the measure on the clients' own test rows after the last round,
    weighted by these rows: the one measure that global and personal models share. ``best`` is the
    same at the round that validation chose. ``quality_unweighted`` counts each client alike, and
    ``quality_worst`` is the worst client's.

    Args:
        name: the row's label.
        summary: the run's summary.json.
        measures: names of the measures.
        asked: clients that were asked to train, summed over the rounds.

    Returns:
        The columns of comparison.csv.
    """
    values, sent = run_values(summary, measures.quality, measures.selects), summary["bytes"]
    client_rounds = max(1, asked)
    return {
        "method": name,
        **{key: values[key] for key in ("quality", "quality_unweighted", "quality_worst")},
        "global_test": values["global_test"],
        "round_0": summary["initial"].get(f"{OWN_TEST}{measures.quality}"),
        "best": summary["best"].get(f"{OWN_TEST}{measures.quality}"),
        "best_round": summary["best"]["round"],
        "trained": values["trained"],
        "up_bytes_per_client_round": sent["uplink_bytes"] / client_rounds,
        "down_bytes_per_client_round": sent["downlink_bytes"] / client_rounds,
        "total_bytes": values["bytes"],
        "seconds": values["seconds"],
    }


def run_rows(done: Sequence[Done], measures: Measures) -> Rows:
    """Return the rows of ``runs.csv``, one a run, with further measures in the last columns."""
    rates: dict[str, set[float]] = {}
    for run, _ in done:
        rates.setdefault(run.entry, set()).add(run.lr)
    rows = [_run_row(one, measures, len(rates[one.run.entry]) > 1) for one in done]
    names = {name for row in rows for name in row}
    further = sorted(name for name in names if name.startswith((OWN_TEST, SERVER_TEST)))
    return [dict.fromkeys([*FIRST, *VALUES, *further]) | row for row in rows]


def _run_row(one: Done, measures: Measures, searched: bool) -> dict[str, Any]:
    run, outcome = one
    row: dict[str, Any] = {"method": run.entry, "lr": run.lr, "seed": run.seed, "failed": None}
    why = measures.missing(outcome, searched)
    if why or isinstance(outcome, Exception):
        return row | {"failed": why}
    values = run_values(outcome, measures.quality, measures.selects)
    return row | values | further_measures(outcome, measures)


def ranked_lrs(rows: Rows, sign: int) -> list[float]:
    """Rank a method's learning rates by the mean over its seeds on validation rows.

    A rate at which more seeds came to their end goes first, because a mean over the survivors says
    nothing of the other seeds; so does a rate that was run with more seeds, because it was better
    with the first. Among equals, the smaller rate goes first.

    Args:
        rows: the method's rows of ``runs.csv``.
        sign: 1 if more is better, -1 if less.

    Returns:
        The learning rates of which a run came to its end, the best one first.
    """
    by_lr: dict[float, list[Any]] = {}
    for row in rows:
        if row["failed"] is None:
            by_lr.setdefault(row["lr"], []).append(row["validation"])
    if len(by_lr) == 1:
        return [*by_lr]  # it was not searched, and its validation need not be there

    def rank(lr: float) -> tuple[int, float, float]:
        # Rounded, because equal shares of rows may have means that differ in the last bit.
        return len(by_lr[lr]), round(sign * mean(by_lr[lr]), 9), -lr

    return sorted(by_lr, key=rank, reverse=True)


def study_row(rows: Rows, sign: int) -> dict[str, Any]:
    """Sum up a method at its chosen learning rate.

    Args:
        rows: the method's rows of ``runs.csv``.
        sign: 1 if more of the measure that chooses is better, -1 if less.

    Returns:
        Mean and sample standard deviation of the quality and of the measure on the server's test
        rows, and by name of the further ``measures``, over ``seeds`` of ``of`` seeds; mean of the
        bytes. They are null if every run failed, or if the server has no model of its own to test.
    """
    ranked, grid = ranked_lrs(rows, sign), {row["lr"] for row in rows}
    lr = ranked[0] if ranked else None
    ended = [row for row in rows if row["lr"] == lr and row["failed"] is None]
    further = [name for name in rows[0] if name.startswith((OWN_TEST, SERVER_TEST))]
    spreads = {
        name: mean_and_sd([row[name] for row in ended if row[name] is not None])
        for name in ("quality", "global_test", "validation", *further)
    }
    quality, sd = spreads.pop("quality")
    global_test, global_sd = spreads.pop("global_test")
    return {
        "method": rows[0]["method"],
        "lr": lr,
        "ranked_lrs": ranked,
        "edge": len(grid) > 1 and lr in (min(grid), max(grid)),
        "quality": quality,
        "sd": sd,
        "global_test": global_test,
        "global_sd": global_sd,
        "seeds": len(ended),
        "of": len({row["seed"] for row in rows}),
        "measures": spreads,
        "trained": max((row["trained"] for row in ended), default=None),
        "bytes": mean(row["bytes"] for row in ended) if ended else None,
    }


def edges(done: Sequence[Done], measures: Measures) -> dict[str, float]:
    """Return, by entry, the best learning rate where it is the first or last of its grid."""
    by_entry: dict[str, Rows] = {}
    for row in run_rows(done, measures):
        by_entry.setdefault(row["method"], []).append(row)
    rows = [study_row(rows, measures.sign) for rows in by_entry.values()]
    return {row["method"]: row["lr"] for row in rows if row["edge"]}


def baseline(done: Sequence[Done]) -> float | None:
    """Return the score of a client's commonest label on its own test rows, mean over seeds."""
    by_seed: dict[int, float] = {}
    key = f"{OWN_TEST}baseline"
    for run, outcome in done:
        if isinstance(outcome, dict) and key in outcome["baseline"]:
            by_seed.setdefault(run.seed, outcome["baseline"][key])
    return mean(by_seed.values()) if by_seed else None
