"""Who holds what: rows by client and label, where a run's server knew them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fedpeft.reporting.report.chart import HeatChart
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.run_directory import HELD
from fedpeft.reporting.saved_runs import SavedRun

MOST_CHARTS, MOST_CLIENTS, MOST_LABELS = 4, 200, 100


def held_charts(runs: Runs) -> Iterator[HeatChart]:
    """Yield a heat map for each division of the rows, which settings may share; a few at most."""
    seen: dict[bytes, tuple[np.ndarray, list[str], SavedRun, str]] = {}
    for setting in runs.settings:
        for run in setting.runs:
            if (table := _held(run)) is not None:
                counts, labels = table
                key = counts.tobytes() + repr(labels).encode()
                seen.setdefault(key, (counts, labels, run, setting.name))
    for number, (counts, labels, run, name) in enumerate(list(seen.values())[:MOST_CHARTS]):
        kind = run.settings.get("partition.column") or run.settings.get("data.label") or "label"
        title = f"Rows by client and {kind}, seed {run.settings['seed']}"
        alike = "one of the settings that share it is " if len(runs.settings) > 1 else ""
        notes = [f"As in {run.path} ({alike}{name})."]
        if number == 0 and len(seen) > MOST_CHARTS:
            notes.append(f"{len(seen) - MOST_CHARTS} more divisions are not drawn.")
        clients, width = counts.shape
        if clients > MOST_CLIENTS or width > MOST_LABELS:
            notes.append(
                f"Of {clients} clients and {width} labels, the first {MOST_CLIENTS} and the "
                f"{MOST_LABELS} commonest at most."
            )
            counts, labels = _part(counts, labels)
        yield HeatChart(f"held_{number}", title, counts, labels, str(kind), notes=notes)


def _held(run: SavedRun) -> tuple[np.ndarray, list[str]] | None:
    """Return rows by client and label, (clients, labels), and the labels; null if unknown."""
    file = run.path / HELD
    if not file.exists():
        return None
    from pyarrow import parquet  # takes a quarter of a second

    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    labels = sorted(set(columns["label"]))
    places = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((max(columns["client"]) + 1, len(labels)), np.int64)
    for client, label, rows in zip(*(columns[n] for n in ("client", "label", "rows")), strict=True):
        counts[client, places[label]] = rows
    return counts, labels


def _part(counts: np.ndarray, labels: list[str]) -> tuple[np.ndarray, list[str]]:
    commonest = sorted(np.argsort(-counts.sum(0), kind="stable")[:MOST_LABELS])
    return counts[:MOST_CLIENTS, commonest], [labels[i] for i in commonest]
