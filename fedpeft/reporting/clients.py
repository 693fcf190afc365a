"""``fedpeft show``: what each client got in one round of a run, from the run's own files."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.reporting.observer import P10, REPLIED, UNWEIGHTED, WORST
from fedpeft.reporting.run_files import (
    CLIENTS,
    METRICS,
    PACKED,
    in_columns,
    read_lines,
    read_metrics,
)
from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.reporting.tables import Page, Rows, mean_text

MEASURED = ("validation_", "test_")  # begin the names of what clients measure
SUMMED = {"": "mean by rows", UNWEIGHTED: "mean by client", P10: "10th percentile", WORST: "worst"}


def read_clients(run: Path, round: int | None = None) -> Rows:
    """Return a run's table of clients, one row a round and client, without what is not known.

    Args:
        run: the run's directory; the run may still go on, or have been killed.
        round: the number of the only round to return; null for all.

    Raises:
        ValueError: the directory holds no such table.
    """
    table = read_columns(run)
    if round is not None:
        table = table.filter(table["round"].to_numpy() == round)
    return [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]


def read_columns(run: Path, names: Collection[str] | None = None) -> Any:
    """Return a run's table of clients as a pyarrow table, which takes little room.

    Args:
        run: the run's directory.
        names: columns to read; the table may lack some of them; null reads all columns.

    Raises:
        ValueError: the directory holds no such table.
    """
    if (run / CLIENTS).exists():
        table = in_columns(read_lines(run / CLIENTS))
        return table.select([n for n in table.column_names if names is None or n in names])
    if not (run / PACKED).exists():
        raise ValueError(f"{run} holds no {PACKED} and no {CLIENTS}: give a run's directory")
    from pyarrow import parquet  # takes a quarter of a second

    with parquet.ParquetFile(run / PACKED) as file:
        known = file.schema_arrow.names
        return file.read(known if names is None else [name for name in known if name in names])


@dataclass(frozen=True)
class ClientTable:
    """The clients of one round.

    Args:
        run: the run's directory.
        round: the round's number.
        rows: one row a client, sorted.
        line: the round in metrics.jsonl; empty if the run ended before it was written.
    """

    run: Path
    round: int
    rows: Rows
    line: dict[str, Any]

    @classmethod
    def of(cls, run: Path, round: int | None = None) -> "ClientTable":
        """Read a round's table.

        Args:
            run: the run's directory.
            round: the round's number; null for the last one that clients measured, else trained in.

        Raises:
            ValueError: the directory holds no run, or no clients in this round.
        """
        rounds, evaluated = _rounds(run)
        if not rounds or (round is not None and round not in rounds):
            asked = "any round" if round is None else f"round {round}"
            known = ", ".join(map(str, rounds)) or "none"
            raise ValueError(f"{run} has no clients in {asked}; rounds with clients: {known}")
        shown = (evaluated or rounds)[-1] if round is None else round
        lines = read_metrics(run) if (run / METRICS).exists() else []
        line = next((line for line in lines if line["round"] == shown), {})
        return cls(run, shown, read_clients(run, shown), line)

    def as_json(self) -> str:
        """Return the round's rows, and its measures summed up, as JSON."""
        summed = {key: value for key, value in self.line.items() if key.startswith("client_")}
        return json.dumps({"round": self.round, "clients": self.rows, "summed": summed})

    def page(self) -> Page:
        """Return the table with a row a client, and below it the measures summed up."""
        measures = self._measures()
        names = [name.replace("_", " ") for name in measures]
        header = ("client", "rows", "train loss", *names, "update norm", "kB up", "kB down", "s")
        cells = [self._cells(row, measures) for row in self.rows]
        cells += self._summed(measures)
        title = f"{self.run}, round {self.round}"
        return Page(title, header, cells, self._notes())

    def _measures(self) -> list[str]:
        """Return the names of what clients measured, without rows and baselines."""
        names = dict.fromkeys(key for row in self.rows for key in row if key.startswith(MEASURED))
        return [name for name in names if not name.endswith(("_rows", "_baseline"))]

    def _cells(self, row: dict[str, Any], measures: list[str]) -> list[str]:
        sent = {
            way: sum(row.get(f"{phase}{way}link_bytes", 0) for phase in ("", "evaluation_"))
            for way in ("up", "down")
        }
        seconds = [row[key] for key in ("train_seconds", "evaluation_seconds") if key in row]
        return [
            str(row["client"]) + self._outcome(row),
            str(row.get("train_rows", "-")),
            *(mean_text(row.get(key), form=".4f") for key in ("train_loss", *measures)),
            mean_text(row.get("update_norm"), form=".4f"),
            f"{sent['up'] / 1e3:.1f}",
            f"{sent['down'] / 1e3:.1f}",
            f"{sum(seconds):.1f}" if seconds else "-",
        ]

    def _outcome(self, row: dict[str, Any]) -> str:
        """Say in which phase a client did not do what it was asked."""
        phases = {"outcome": "train", "evaluation_outcome": "evaluate"}
        bad = [
            f"{row[key]} ({name})"
            for key, name in phases.items()
            if row.get(key, REPLIED) != REPLIED
        ]
        return f" {', '.join(bad)}" if bad else ""

    def _summed(self, measures: list[str]) -> list[list[str]]:
        if not any(f"client_{name}" in self.line for name in measures):
            return []
        return [
            [text, "", ""]
            + [mean_text(self.line.get(f"client_{name}{suffix}"), form=".4f") for name in measures]
            + [""] * 4
            for suffix, text in SUMMED.items()
        ]

    def _notes(self) -> list[str]:
        file = CLIENTS if (self.run / CLIENTS).exists() else PACKED
        return [
            "rows: those that train; kB: the messages of training and evaluation; s: the client's "
            "own clock, of clients in one pass the whole pass.",
            "10th percentile: nine of ten clients are as good or better.",
            *self._ended(),
            f"All rounds and columns: {self.run / file}",
        ]

    def _ended(self) -> list[str]:
        """Say how the run ended; nothing if it has no summary yet."""
        summary = SavedRun(self.run).summary
        if summary is None:
            return []
        notes = [f"Best round by {summary['selected_by']}: {summary['best']['round']}."]
        if stopped := summary.get("stopped_early"):
            notes.append(f"Ended early after round {stopped['round']}: {stopped['reason']}.")
        return notes


def _rounds(run: Path) -> tuple[list[int], list[int]]:
    """Return the rounds with clients, and the rounds in which a client measured itself, sorted."""
    table = read_columns(run)
    if not table.num_rows:
        return [], []
    numbers = table["round"].to_numpy()
    measured = np.zeros(len(numbers), bool)
    for name in table.column_names:
        if name.startswith(MEASURED):
            measured |= table[name].is_valid().to_numpy()
    return np.unique(numbers).tolist(), np.unique(numbers[measured]).tolist()
