"""The report of ``fedpeft check``: a table, and sentences."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fedpeft.data.rows.source import SPLITS
from fedpeft.reporting.tables import print_table, span, span_of_bytes
from fedpeft.versions import SHOWN

VERSIONS = ("python", *SHOWN)
HASH = 12  # shown digits of the weights' SHA-256


@dataclass(frozen=True)
class Report:
    """A run's facts, before it trains.

    Args:
        title: the method and the model.
        server: facts of the server's process by name.
        clients: facts of each client's node, with its rows by split.
        rows: number of rows of the server's data set, by split.
        parameters: counts of what a client trains and sends in a round, see ``parameter_counts``.
        problems: sentences; the run would fail, or not be what it seems.
        notes: sentences on what may be as it is meant.
    """

    title: str
    server: Mapping[str, Any]
    clients: Mapping[int, Mapping[str, Any]]
    rows: Mapping[str, int]
    parameters: Mapping[str, Any]
    problems: Sequence[str]
    notes: Sequence[str]

    def as_json(self) -> str:
        """Return the report for other programs."""
        return json.dumps(asdict(self))

    def show(self) -> None:
        """Print the table and the sentences; clients of equal versions and weights are a column."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for client, facts in sorted(self.clients.items()):
            key = tuple(facts[name] for name in (*VERSIONS, "weights"))
            alike.setdefault(key, []).append(client)
        columns = [self._column(clients) for clients in alike.values()]
        header = ["", "server", *map(named, alike.values())]
        rows = [list(row) for row in zip(*[NAMES, self._server_column(), *columns], strict=True)]
        print_table(self.title, header, rows)
        for kind, sentences in (("problem", self.problems), ("note", self.notes)):
            for sentence in sentences:
                print(f"{kind}: {sentence}")
        if not self.problems:
            print("no problem was found; nothing was trained")

    def _server_column(self) -> list[str]:
        facts, counts = self.server, self.parameters
        return [
            *_texts(facts),
            *(f"{self.rows[split]:,}" for split in SPLITS),
            *("", span(counts["trained"])),
            *(span_of_bytes(counts[f"bytes_{way}"]) for way in ("up", "down")),
            *(_number(facts[name]) for name in MEMORY),
            str(facts["cpus"]),
        ]

    def _column(self, clients: Sequence[int]) -> list[str]:
        facts = [self.clients[client] for client in clients]
        splits = [[f[split] for f in facts] for split in SPLITS]
        whole = [sum(numbers) for numbers in zip(*splits, strict=True)]
        return [
            *_texts(facts[0]),
            *(f"{sum(numbers):,}" for numbers in splits),
            f"{min(whole):,} / {median(whole):,.0f} / {max(whole):,}",
            *[""] * 3,
            *(_least_and_most([f[name] for f in facts], _number) for name in MEMORY),
            _least_and_most([f["cpus"] for f in facts], str),
        ]


MEMORY = ("used_bytes", "free_bytes", "gpu_free_bytes", "gpu_bytes")
NAMES = [
    *VERSIONS,
    "weights, SHA-256",
    *(f"{split} rows" for split in SPLITS),
    "rows of a client: min / median / max",
    "parameters that a client trains",
    *("MB up a round and client", "MB down"),
    *("MiB of this process", "MiB free", "MiB free on the GPU", "MiB of the GPU"),
    "cores",
]


def named(clients: Iterable[int]) -> str:
    """Return clients, sorted, as text: ``clients 0-2, 5``."""
    spans: list[list[int]] = []
    for number in clients:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"client {text}" if text.isdigit() else f"clients {text}"


def _texts(facts: Mapping[str, Any]) -> list[str]:
    return [str(facts[name]) for name in VERSIONS] + [facts["weights"][:HASH]]


def _number(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size else "-"


def _least_and_most(values: Sequence[int], text: Any) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}-{high}"
