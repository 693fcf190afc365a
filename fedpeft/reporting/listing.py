"""``fedpeft results``: the runs below folders as rows, filtered, sorted, averaged and exported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft.config.choices import choices, of_choice
from fedpeft.config.compose import GROUPS
from fedpeft.reporting.brief import MOST, below, brief
from fedpeft.reporting.conditions import Condition, check_known
from fedpeft.reporting.inputs import mixed
from fedpeft.reporting.results import common_label, headline, mean_and_sd, run_values
from fedpeft.reporting.saved_runs import SavedRun, by_setting, differing, one_a_seed, saved_runs
from fedpeft.reporting.tables import (
    Page,
    Rows,
    counted,
    mean_text,
    seeds_text,
    width_of,
    write_csv,
)

SD = "_sd"  # ends the column of a sample standard deviation
NUMBERS = (  # columns of a run's numbers, and their titles
    ("quality", "quality"),
    ("baseline", "commonest label"),
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
MOST_NAMED = 12  # other settings that a note names, at most
# Columns in the order in which they are left out if a terminal has no room; settings come after
# them, the last one first.
LEFT_OUT = (
    *("seconds", "selection", "best_round", "quality_unweighted", "quality_worst", "validation"),
    *("bytes", "global_test", "status", "rounds"),
)
ALWAYS = ("path", "method", "quality", "baseline", "seeds")  # columns that stay


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
            folders: folders of runs, studies or sweeps.
            conditions: conditions on columns, settings or measures, such as ``lr<0.01``.

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
        return [*groups, *(key for key in keys if not of_choice(key, groups, self.whole))]

    @property
    def _by_length(self) -> list[str]:
        """``apart`` with the settings last that have a long value, such as a prompt."""

        def long(key: str) -> bool:
            return max(len(str(row.get(key))) for row in self.whole) > MOST

        return sorted(self.apart, key=long)

    @property
    def shown(self) -> list[str]:
        """The columns that are shown if none are named."""
        held = [key for key, _ in NUMBERS if any(row.get(key) is not None for row in self.whole)]
        measures = {row["measure"] for row in self.whole} - {None}
        few = self._by_length[:MOST_SETTINGS]
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
        if any(row.get("baseline") is not None for row in self.whole):
            notes.append("Commonest label: the score of always answering a client's commonest.")
        if more := self._by_length[MOST_SETTINGS:]:
            names = ", ".join(more[:MOST_NAMED])
            names += f" and {len(more) - MOST_NAMED} more" if len(more) > MOST_NAMED else ""
            notes.append(f"These settings differ too (--columns shows them): {names}.")
        notes += mixed(run.inputs for run in self.runs if run.summary is not None)
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
    values = run_values(summary, measure, measure)
    values |= {
        "measure": measure or None,
        "baseline": common_label(summary, values["quality"]),
        "selected_by": summary["selected_by"],
        "selection": final.get(summary["selected_by"]),
        "best_round": summary["best"]["round"],
    }
    return row | values | run.settings | {k: v for k, v in final.items() if k != "round"}


def _averaged(rows: Rows, measures: Sequence[str]) -> dict[str, Any]:
    """Return the columns in which rows agree, and means and sample deviations of the numbers.

    Args:
        rows: rows of runs that differ in the seed alone.
        measures: names of columns that are numbers, besides ``NUMBERS``.
    """
    ended = [row for row in rows if row["status"] == "completed"]
    row = {key: value for key, value in rows[0].items() if key not in ("path", "hash", "seed")}
    row = {key: v for key, v in row.items() if all(key in r and r[key] == v for r in rows)}
    row["seeds"] = seeds_text(len(ended), len(rows))
    for key in (*TITLES, *measures):
        values = [r[key] for r in ended if r.get(key) is not None]
        if key != "best_round":
            row[key], row[f"{key}{SD}"] = mean_and_sd(values)
        elif values:  # a round is no measure, so it has no mean
            row[key] = "-".join(str(value) for value in sorted({min(values), max(values)}))
    return row


def ordered(rows: Rows, column: str, reverse: bool) -> Rows:
    """Return rows sorted by a column; rows without a value come last.

    Args:
        rows: one row a run, or one a setting.
        column: the column's name; its values are sorted as texts unless all are numbers.
        reverse: the largest first.
    """
    have = [row for row in rows if row.get(column) is not None]
    numbers = all(isinstance(row[column], int | float) for row in have)
    have.sort(key=lambda row: row[column] if numbers else str(row[column]), reverse=reverse)
    return [*have, *(row for row in rows if row.get(column) is None)]


def page(rows: Rows, columns: Sequence[str], notes: Sequence[str]) -> Page:
    """Return a table of rows, with whole values.

    Args:
        rows: one row a run, or one a setting.
        columns: the names of the columns to show.
        notes: sentences below the table.
    """
    cells = [[_text(row, column) for column in columns] for row in rows]
    header = [TITLES.get(column, column) for column in columns]
    return Page(counted(len(rows), "row"), header, cells, notes)


def narrow_page(rows: Rows, columns: Sequence[str], notes: Sequence[str], room: int | None) -> Page:
    """Return a table that a terminal has room for.

    Values that all rows share stand once above the table, and so does the folder of all runs. Long
    values are shortened, and columns for which there is no room are left out and named.

    Args:
        rows: one row a run, or one a setting.
        columns: the names of the columns to show.
        notes: sentences below the table.
        room: columns of the terminal; null for any number.
    """
    texts = {column: brief([_text(row, column) for row in rows]) for column in columns}
    shared, above = _shared(rows, texts), []
    if "path" in columns:
        folder, texts["path"] = below([row["path"] for row in rows])
        above += [f"runs below {folder}"] if folder else []
    if alike := [f"{TITLES.get(name, name)} {text}" for name, text in shared.items()]:
        above.append(f"all of them: {', '.join(alike)}")
    kept = {column: cells for column, cells in texts.items() if column not in shared}
    out = _without_room(kept, room)
    cells = [list(row) for row in zip(*(v for k, v in kept.items() if k not in out), strict=True)]
    header = [TITLES.get(column, column) for column in kept if column not in out]
    if out:
        notes = [*notes, f"No room for: {', '.join(out)} (--columns A,B shows what it names)."]
    return Page(counted(len(rows), "row"), header, cells, notes, above)


def _shared(rows: Rows, texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the groups' choices and the columns that are the same in all of several rows."""
    if len(rows) < 2:
        return {}
    chosen = {group: [row.get(group) for row in rows] for group in GROUPS}
    shared = {g: str(v[0]) for g, v in chosen.items() if len(set(v)) == 1 and v[0] is not None}
    listed = ("path", "quality", "baseline")  # also where they are the same
    same = {c for c in texts if c not in listed and len({str(row.get(c)) for row in rows}) == 1}
    return shared | {c: texts[c][0] for c in texts if c in same}


def _without_room(texts: Mapping[str, Sequence[str]], room: int | None) -> list[str]:
    """Return the columns to leave out, so that the others fit into a terminal.

    Args:
        texts: the cells by column.
        room: columns of the terminal; null for any number.
    """
    widths = {c: width_of(TITLES.get(c, c), cells) for c, cells in texts.items()}
    settings = [c for c in reversed(list(texts)) if c not in (*LEFT_OUT, *ALWAYS)]
    waiting = [c for c in (*LEFT_OUT, *settings) if c in texts]
    out: list[str] = []
    while room is not None and waiting and sum(widths.values()) + 1 > room:
        out.append(waiting.pop(0))
        del widths[out[-1]]
    return out


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
    return mean_text(value, sd, digits)


def export(rows: Rows, file: Path) -> None:
    """Write rows with all digits as Parquet or CSV.

    Args:
        rows: rows with the same columns or not; a column that a row lacks is empty there.
        file: path of the file, with an ending that ``check_export`` takes.
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
        ValueError: the name ends in neither ``.parquet`` nor ``.csv``.
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
