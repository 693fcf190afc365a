"""Tables and pictures: comparisons, parameter counts, and who holds what."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Rows = list[dict[str, Any]]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file or pipe has no width to fold to
        console = Console(width=200)
    console.print(table)


def span(pair: Sequence[int]) -> str:
    """``12,345`` or, where it differs by round, ``12,345-23,456``."""
    low, high = pair
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def span_of_bytes(pair: Sequence[int]) -> str:
    """In megabytes, of 10^6 bytes: ``0.243`` or ``0.061-0.080``."""
    low, high = (f"{number / 1e6:,.3f}" for number in pair)
    return low if low == high else f"{low}-{high}"


HEADER = (
    "method",
    "quality",
    "global test",
    "round 0",
    "best",
    "at round",
    "trained",
    "kB up/round",
    "kB down/round",
    "MB total",
    "s",
)


def comparison_rows(summaries: dict[str, dict[str, Any]], metric: str, cohort: int) -> Rows:
    """One row a method, best quality first.

    ``quality`` is the mean of ``metric`` on the clients' own test rows after the last round, the
    one measure that global and personal models share; ``best`` is the same at the round that
    validation chose.
    """
    rows = []
    for name, summary in summaries.items():
        size, rounds = summary["bytes"], len(summary["interference"])
        rows.append(
            {
                "method": name,
                "quality": summary["final"][f"client_test_{metric}"],
                "global_test": summary["final"].get(f"test_{metric}"),
                "round_0": summary["initial"].get(f"client_test_{metric}"),
                "best": summary["best"].get(f"client_test_{metric}"),
                "best_round": summary["best"]["round"],
                "trained": summary["parameters"]["trained"][1],
                "up_bytes_per_client_round": size["uplink_bytes"] / rounds / cohort,
                "down_bytes_per_client_round": size["downlink_bytes"] / rounds / cohort,
                "total_bytes": size["uplink_bytes"] + size["downlink_bytes"],
                "seconds": summary["seconds"],
            }
        )
    return sorted(rows, key=lambda row: -row["quality"])


def comparison_cells(rows: Rows) -> list[list[str]]:
    """The rows as text, in the order of ``HEADER``."""
    return [
        [
            row["method"],
            f"{row['quality']:.3f}",
            *(_measure(row[key]) for key in ("global_test", "round_0", "best")),
            str(row["best_round"]),
            f"{row['trained']:,}",
            f"{row['up_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['down_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['total_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]


def _measure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_comparison(folder: Path, rows: Rows, notes: Sequence[str]) -> None:
    """Saves ``comparison.md`` and ``comparison.csv``."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in comparison_cells(rows)]
    (folder / "comparison.md").write_text("\n".join([*lines, "", *notes]) + "\n")
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot_comparison(
    path: Path,
    rows: Rows,
    curves: dict[str, Rows],
    metric: str,
    selects: str,
    baseline: float | None,
) -> None:
    """Quality against megabytes sent, and what selects the best round, by round."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    key = f"client_validation_{selects}"
    for i, row in enumerate(rows):
        style = {"color": f"C{i}", "marker": "osD^vP"[i % 6], "label": row["method"]}
        left.plot(row["total_bytes"] / 1e6, row["quality"], linestyle="none", ms=9, **style)
        points = [(line["round"], line[key]) for line in curves[row["method"]] if key in line]
        right.plot(*zip(*points, strict=True), ms=4, **style)
    name, selected = metric.replace("_", " "), selects.replace("_", " ")
    left.set(xscale="log", xlabel="MB sent, all clients, both ways", ylabel=f"test {name}")
    right.set(xlabel="round", ylabel=f"validation {selected}")
    titles = ("Quality against bytes sent", f"{selected.capitalize()} by round")
    for axis, title in zip((left, right), titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if baseline is not None:
            axis.axhline(baseline, color="grey", ls="--", lw=1, label="commonest label")
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_partition(
    path: Path, counts: np.ndarray, labels: Sequence[str], kind: str = "label"
) -> None:
    """Who holds what: a heat map of (clients, labels) counts, coloured by their square roots.

    Args:
        kind: what the labels are.
    """
    from matplotlib.colors import PowerNorm

    plt = pyplot()
    wide, high = _inches(counts.shape[1], 0.15, 0.7, 20), _inches(counts.shape[0], 0.13, 0.35, 14)
    figure, axis = plt.subplots(figsize=(2.5 + wide, 1.8 + high), layout="constrained")
    pixels = "nearest" if max(counts.shape) <= 2000 else "auto"
    norm = PowerNorm(0.5, vmin=0)
    image = axis.imshow(counts, aspect="auto", cmap="Blues", norm=norm, interpolation=pixels)
    axis.set(xlabel=kind, ylabel="client", title=f"Training rows by client and {kind}")
    _name_cells(axis, counts, labels, wide, high)
    figure.colorbar(image, label="rows")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _inches(cells: int, least: float, most: float, whole: float) -> float:
    """Length of an axis whose cells are ``least`` to ``most`` inches, at most ``whole`` in all."""
    return min(whole, cells * min(most, max(least, 12 / cells)))


def _name_cells(
    axis: Any, counts: np.ndarray, labels: Sequence[str], wide: float, high: float
) -> None:
    """Ticks of clients and labels and, where there is room, the counts."""
    clients, classes = counts.shape
    roomy, columns = wide / classes > 0.4, _ticks(classes, wide)
    slant = {"rotation": 45, "ha": "right"} if roomy else {"rotation": 90, "fontsize": 7}
    names = [_short(labels[i]) for i in columns]
    axis.set_xticks(columns, names, parse_math=False, **slant)
    axis.set_yticks(_ticks(clients, high))
    axis.tick_params(axis="y", labelsize=9 if high / clients > 0.2 else 7)
    if roomy and clients <= 40:
        for (i, j), count in np.ndenumerate(counts):
            colour = "w" if count > counts.max() / 3 else "k"
            axis.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)


def _ticks(count: int, inches: float) -> range:
    """Every first, second, fifth, tenth ... number, so that ticks are 0.12 inches apart."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if step * inches >= 0.12 * count))


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
