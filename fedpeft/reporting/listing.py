"""``fedpeft results``: the runs below folders as rows, filtered, sorted, averaged and exported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft.config.choices import choices
from fedpeft.config.load import GROUPS
from fedpeft.reporting.conditions import Condition, check_known
from fedpeft.reporting.results import Measures, headline, mean_and_sd, run_values
from fedpeft.reporting.saved_runs import SavedRun, by_setting, differing, one_a_seed, saved_runs
from fedpeft.reporting.tables import Page, Rows, write_csv

SD = "_sd"  # ends the column of a sample standard deviation
NUMBERS = (  # columns of a run's numbers, and their titles
    ("quality", "quality"),
    ("quality_unweighted", "unweighted"),
    ("quality_worst", "worst"),
    ("global_test", "global test"),
    ("validation", "validation"),
    ("selection", "selection"),
    ("best_round", "best round"),
    ("bytes", "MB"),
    ("seconds", "s"),
)
TITLES = dict(NUMBERS)
MOST_SETTINGS = 8  # columns of settings that are shown if none are named


@dataclass(frozen=True)
class Listing:
    """Runs and their rows.

    Args:
        runs: the runs.
    """

    runs: Sequence[SavedRun]

    @classmethod
    def of(cls, folders: Sequence[Path], conditions: Sequence[str] = ()) -> "Listing":
        """Find the runs in folders that meet all conditions.

        Args:
            folders: of runs, studies or sweeps.
            conditions: on columns, settings or measures, such as ``lr<0.01``.

        Raises:
            ValueError: a folder holds no run, a condition is none or names what no run has, or no
                run meets them.
        """
        every = cls(saved_runs(folders))
        wanted = [Condition.of(text) for text in conditions]
        for condition in wanted:
            check_known(condition.column, every.known)
        met = [all(condition.holds(row) for condition in wanted) for row in every.whole]
        runs = [run for run, holds in zip(every.runs, met, strict=True) if holds]
        if not runs:
            raise ValueError(f"none of {len(every.runs)} runs meets {' '.join(conditions)}")
        return cls(runs)

    @cached_property
    def whole(self) -> Rows:
        """A row a run, with all settings and all measures of its last round."""
        return [_row(run) for run in self.runs]

    @property
    def known(self) -> list[str]:
        """The names of all columns."""
        return list(dict.fromkeys(key for row in self.whole for key in row))

    @property
    def measures(self) -> list[str]:
        """The names of what was measured after the last round, the data's own metrics with it."""
        finals = [run.summary["final"] for run in self.runs if run.summary is not None]
        numbers = [k for final in finals for k, v in final.items() if isinstance(v, int | float)]
        return [key for key in dict.fromkeys(numbers) if key != "round"]

    @cached_property
    def apart(self) -> list[str]:
        """The settings that differ; where a group's choice differs, the choice alone."""
        groups = [g for g in GROUPS if len({row[g] for row in self.whole}) > 1]
        keys = [key for key in differing(self.runs) if not key.endswith("._target_")]
        return [*groups, *(key for key in keys if not self._of_choice(key, groups))]

    def _of_choice(self, key: str, groups: Sequence[str]) -> bool:
        """Tell whether a setting differs only because the choice of its group does."""
        group = key.partition(".")[0]
        if group not in groups:
            return False
        values: dict[Any, set[str]] = {}
        for row in self.whole:
            values.setdefault(row[group], set()).add(repr(row.get(key)))
        return all(len(of_choice) == 1 for of_choice in values.values())

    @property
    def shown(self) -> list[str]:
        """The columns that are shown if none are named."""
        held = [key for key, _ in NUMBERS if any(row.get(key) is not None for row in self.whole)]
        measures = {row["measure"] for row in self.whole} - {None}
        few = self.apart[:MOST_SETTINGS]
        return ["path", "status", *few, "rounds", *["measure"] * (len(measures) > 1), *held]

    @property
    def notes(self) -> list[str]:
        """Sentences on what is shown."""
        measures = sorted({row["measure"] for row in self.whole} - {None})
        notes = [
            f"quality: {' or '.join(measures)} on the clients' own test rows after the last round, "
            "mean by rows; unweighted: mean by clients; global test: the server's model on the "
            "test set; validation: as quality, on the clients' own validation rows; selection: the "
            "measure that selects the best round, which selected_by names.",
        ]
        if any(row["status"] == "completed" and row["quality"] is None for row in self.whole):
            notes.append("Quality is -: clients were not measured, evaluation.clients=always does.")
        if more := self.apart[MOST_SETTINGS:]:
            notes.append(f"These settings differ too (--columns shows them): {', '.join(more)}.")
        return notes if measures else notes[1:]

    def over_seeds(self) -> Rows:
        """Return a row a setting: its runs that differ in the seed alone, as mean and deviation."""
        rows = {run.path: row for run, row in zip(self.runs, self.whole, strict=True)}
        groups = [one_a_seed(group) for group in by_setting(self.runs)]
        return [_averaged([rows[run.path] for run in group], self.measures) for group in groups]

    def rounds(self) -> Rows:
        """Return a row a run, round and measure, with the run's settings that differ."""
        keys = ["path", *self.apart]
        return [
            {key: _plain(row.get(key)) for key in keys}
            | {"round": line["round"], "measure": name, "value": value}
            for run, row in zip(self.runs, self.whole, strict=True)
            for line in run.lines
            for name, value in line.items()
            if name != "round" and isinstance(value, int | float)
        ]


def _row(run: SavedRun) -> dict[str, Any]:
    """Return a run's columns, its settings by dotted key, and its measures by name."""
    summary = run.summary
    rounds = (summary["final"] if summary else run.lines[-1] if run.lines else {}).get("round")
    row: dict[str, Any] = {"path": str(run.path), "status": run.status, "rounds": rounds}
    row |= {"hash": run.hash, **choices(run.settings), "measure": None}
    if summary is None:
        return row | run.settings
    final, measure = summary["final"], headline(summary)
    values = run_values(summary, Measures(measure, measure, 1))
    values |= {
        "measure": measure or None,
        "global_test": final.get(f"test_{measure}"),
        "selected_by": summary["selected_by"],
        "selection": final.get(summary["selected_by"]),
        "best_round": summary["best"]["round"],
    }
    return row | values | run.settings | {k: v for k, v in final.items() if k != "round"}


def _averaged(rows: Rows, measures: Sequence[str]) -> dict[str, Any]:
    """Return the columns in which rows agree, and means and sample deviations of the numbers.

    Args:
        rows: of runs that differ in the seed alone.
        measures: names of columns that are numbers, besides ``NUMBERS``.
    """
    ended = [row for row in rows if row["status"] == "completed"]
    row = {key: value for key, value in rows[0].items() if key not in ("path", "hash", "seed")}
    row = {key: v for key, v in row.items() if all(key in r and r[key] == v for r in rows)}
    row["seeds"] = f"{len(ended)} of {len(rows)}" if len(ended) < len(rows) else str(len(rows))
    for key in (*TITLES, *measures):
        values = [r[key] for r in ended if r.get(key) is not None]
        if key != "best_round":
            row[key], row[f"{key}{SD}"] = mean_and_sd(values)
        elif values:  # a round is no measure, so it has no mean
            row[key] = "-".join(str(value) for value in sorted({min(values), max(values)}))
    return row


def ordered(rows: Rows, column: str, reverse: bool) -> Rows:
    """Return rows sorted by a column; those that have no value come last.

    Args:
        rows: one a run, or one a setting.
        column: its name; its values are sorted as texts unless all are numbers.
        reverse: the largest first.
    """
    have = [row for row in rows if row.get(column) is not None]
    numbers = all(isinstance(row[column], int | float) for row in have)
    have.sort(key=lambda row: row[column] if numbers else str(row[column]), reverse=reverse)
    return [*have, *(row for row in rows if row.get(column) is None)]


def page(rows: Rows, columns: Sequence[str], notes: Sequence[str]) -> Page:
    """Return a table of rows.

    Args:
        rows: one a run, or one a setting.
        columns: the names of the columns to show.
        notes: sentences below the table.
    """
    cells = [[_text(row, column) for column in columns] for row in rows]
    header = [TITLES.get(column, column) for column in columns]
    return Page(f"{len(rows)} row{'s' * (len(rows) > 1)}", header, cells, notes)


def _text(row: Mapping[str, Any], column: str) -> str:
    """Return a cell as text, with its deviation if it is a mean of several."""
    value, sd = row.get(column), row.get(f"{column}{SD}")
    if value is None:
        return "-"
    if column == "bytes":
        value, sd = value / 1e6, None if sd is None else sd / 1e6
    measured = column in TITLES or sd is not None
    digits = {"bytes": ".2f", "seconds": ".0f"}.get(column, ".3f" if measured else "g")
    if column == "best_round":
        digits = "g"
    whole = isinstance(value, int) and column not in TITLES
    if whole or isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:{digits}}" + ("" if sd is None else f" ± {sd:{digits}}")


def export(rows: Rows, file: Path) -> None:
    """Write rows with all digits as Parquet or CSV.

    Args:
        rows: with the same columns or not; a column that a row lacks is empty there.
        file: as ``check_export`` wants it.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([_plain(row.get(name)) for row in rows]) for name in names}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        values = zip(*columns.values(), strict=True)
        write_csv(file, [dict(zip(columns, row, strict=True)) for row in values])
        return
    import pyarrow  # takes a quarter of a second
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)


def check_export(file: Path) -> None:
    """Check the name of a file before the runs are read.

    Raises:
        ValueError: it ends in neither ``.parquet`` nor ``.csv``.
    """
    if file.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--to must be a file .parquet or .csv, got {file}")


def _plain(value: Any) -> Any:
    """Return a value that stands in one cell: a list or a mapping as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _column(values: list[Any]) -> list[Any]:
    """Return values of one kind, as Parquet wants: all as texts if the kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if v is None else str(v) for v in values] if len(kinds) > 1 else values
