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
                "round_0": summary["initial"][f"client_test_{metric}"],
                "best": summary["best"][f"client_test_{metric}"],
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
            "-" if row["global_test"] is None else f"{row['global_test']:.3f}",
            f"{row['round_0']:.3f}",
            f"{row['best']:.3f}",
            str(row["best_round"]),
            f"{row['trained']:,}",
            f"{row['up_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['down_bytes_per_client_round'] / 1e3:.1f}",
            f"{row['total_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]


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
    path: Path, rows: Rows, curves: dict[str, Rows], metric: str, baseline: float | None
) -> None:
    """Quality against megabytes sent, and quality by round."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    key = f"client_validation_{metric}"
    for i, row in enumerate(rows):
        style = {"color": f"C{i}", "marker": "osD^vP"[i % 6], "label": row["method"]}
        left.plot(row["total_bytes"] / 1e6, row["quality"], linestyle="none", ms=9, **style)
        points = [(line["round"], line[key]) for line in curves[row["method"]] if key in line]
        right.plot(*zip(*points, strict=True), ms=4, **style)
    name = metric.replace("_", " ")
    left.set(xscale="log", xlabel="MB sent, all clients, both ways", ylabel=f"test {name}")
    right.set(xlabel="round", ylabel=f"validation {name}")
    for axis, title in ((left, "Quality against bytes sent"), (right, "Quality by round")):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if baseline is not None:
            axis.axhline(baseline, color="grey", ls="--", lw=1, label="commonest label")
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_partition(path: Path, counts: np.ndarray, labels: Sequence[str]) -> None:
    """Who holds what: a heat map of (clients, labels) counts."""
    plt = _pyplot()
    clients, classes = counts.shape
    figure, axis = plt.subplots(
        figsize=(2.5 + 0.7 * classes, 1.8 + 0.35 * clients), layout="constrained"
    )
    image = axis.imshow(counts, aspect="auto", cmap="Blues")
    axis.set(xlabel="label", ylabel="client", title="Training rows by client and label")
    axis.set_xticks(range(classes), labels, rotation=45, ha="right")
    axis.set_yticks(range(clients))
    if counts.size <= 400:
        for (i, j), count in np.ndenumerate(counts):
            dark = count > counts.max() / 2
            axis.text(j, i, str(count), ha="center", va="center", color="w" if dark else "k")
    figure.colorbar(image, label="rows")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
