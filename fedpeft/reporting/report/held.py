"""Charts of each client's rows by label, for runs whose server knew them."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedpeft.reporting.report.chart import HeatChart
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.run_files import HELD
from fedpeft.reporting.saved_runs import SavedRun

MOST_CHARTS, MOST_CLIENTS, MOST_LABELS = 4, 200, 100


class Held(NamedTuple):
    """A run's rows by client and label, as they are saved: a count of zero has no entry.

    Attributes:
        clients: the clients' numbers, (entries,).
        places: indices of the labels in ``labels``, (entries,).
        rows: counts of rows, (entries,).
        labels: the labels' names, sorted.
    """

    clients: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    labels: list[str]

    @property
    def hash(self) -> str:
        """Hash that two equal divisions share."""
        order = np.lexsort((self.places, self.clients))
        entries = np.stack([self.clients, self.places, self.rows])[:, order]
        return hashlib.sha256(entries.tobytes() + repr(self.labels).encode()).hexdigest()

    def part(self) -> tuple[np.ndarray, list[str]]:
        """Return the first clients' rows, (clients, labels), and the commonest labels."""
        totals = np.bincount(self.places, self.rows, len(self.labels))
        commonest = np.sort(np.argsort(-totals, kind="stable")[:MOST_LABELS])
        shown = (self.clients < MOST_CLIENTS) & np.isin(self.places, commonest)
        counts = np.zeros((min(self.clients.max() + 1, MOST_CLIENTS), len(commonest)), np.int64)
        columns = np.searchsorted(commonest, self.places[shown])
        counts[self.clients[shown], columns] = self.rows[shown]
        return counts, [self.labels[place] for place in commonest]


def held_charts(runs: Runs) -> Iterator[HeatChart]:
    """Yield a heat map for each division of the rows, which settings may share; a few at most."""
    seen: dict[str, tuple[Held, SavedRun, str]] = {}
    for setting in runs.settings:
        for run in setting.runs:
            if (held := read_held(run)) is not None:
                seen.setdefault(held.hash, (held, run, setting.name))
    for number, (held, run, name) in enumerate(list(seen.values())[:MOST_CHARTS]):
        alike = "one of the settings that share it is " if len(runs.settings) > 1 else ""
        notes = [f"As in {run.path} ({alike}{name})."]
        if number == 0 and len(seen) > MOST_CHARTS:
            notes.append(f"{len(seen) - MOST_CHARTS} more divisions are not drawn.")
        yield _chart(f"held_{number}", run, held, notes)


def _chart(name: str, run: SavedRun, held: Held, notes: list[str]) -> HeatChart:
    kind = run.settings.get("partition.column") or run.settings.get("data.label") or "label"
    title = f"Rows by client and {kind}, seed {run.settings['seed']}"
    clients, width = held.clients.max() + 1, len(held.labels)
    if clients > MOST_CLIENTS or width > MOST_LABELS:
        limits = f"the first {MOST_CLIENTS} and the {MOST_LABELS} commonest at most"
        notes = [*notes, f"Of {clients} clients and {width} labels, {limits}."]
    return HeatChart(name, title, *held.part(), str(kind), notes=notes)


def read_held(run: SavedRun) -> Held | None:
    """Return a run's rows by client and label; null if it did not save them."""
    file = run.path / HELD
    if not file.exists():
        return None
    from pyarrow import parquet  # takes a quarter of a second

    table = parquet.read_table(file)
    coded = table["label"].combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    labels = sorted(names)
    places = {label: place for place, label in enumerate(labels)}
    moved = np.array([places[name] for name in names])
    clients, rows = table["client"].to_numpy(), table["rows"].to_numpy()
    return Held(clients, moved[coded.indices.to_numpy()], rows, labels)
