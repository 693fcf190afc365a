"""Pictures: quality against bytes, quality by round, and who holds what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.reporting.brief import brief
from fedpeft.reporting.tables import Rows

# Functions import matplotlib, because it takes a second and most commands draw nothing.

# Readable on a white page and on a dark one.
COLOURS = (
    *("#2f7ed8", "#e8730c", "#2ca05a", "#d6423b", "#9467bd"),
    *("#a0705a", "#d65db1", "#7f8c8d", "#a59a00", "#17a2b8"),
)
MARKERS = "osDv^P"


def plot_comparison(
    path: Path,
    rows: Rows,
    curves: dict[str, Rows],
    metric: str,
    selects: str,
    baseline: float | None,
) -> None:
    """Draw quality against megabytes sent, and the measure that selects by round.

    Args:
        path: the picture's file.
        rows: rows of comparison.csv.
        curves: lines of metrics.jsonl, by method.
        metric: name of the measure of quality.
        selects: name of the measure that selects the best round.
        baseline: quality of a client's commonest label, or null.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    key = f"client_validation_{selects}"
    for i, row in enumerate(rows):
        drawn = style(i, row["method"])
        _point(left, row["total_bytes"], row["quality"], None, {"ms": 9, **drawn})
        points = [(line["round"], line[key]) for line in curves[row["method"]] if key in line]
        right.plot(*zip(*points, strict=True), ms=4, **drawn)
    _against_bytes(left, [row["total_bytes"] for row in rows], metric, baseline)
    name = selects.replace("_", " ")
    right.set(
        xlabel="round",
        ylabel=f"validation {name}, mean by rows",
        title=f"{name.capitalize()} by round",
    )
    _finish(right, baseline)
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_study(path: Path, rows: Rows, metric: str, baseline: float | None) -> None:
    """Draw each method's mean quality, with its deviation, against megabytes sent.

    Args:
        path: the picture's file.
        rows: one row for each method that has a quality.
        metric: name of the measure of quality.
        baseline: quality of a client's commonest label, or null.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    for i, row in enumerate(rows):
        spread, drawn = row["sd"] or None, style(i, row["method"])
        _point(axis, row["bytes"], row["quality"], spread, drawn)
    _against_bytes(axis, [row["bytes"] for row in rows], metric, baseline)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def style(place: int, label: str) -> dict[str, Any]:
    """Return a setting's colour, marker and label.

    Args:
        place: the setting's place among all settings, which decides colour and marker.
        label: the setting's name in the legend.
    """
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {"color": colour, "marker": marker, "label": label}


def _point(
    axis: Any, sent: float, quality: float, spread: float | None, drawn: dict[str, Any]
) -> None:
    """Draw a method's quality at its bytes; as a dotted line without its spread if it sends none.

    A logarithmic axis has no 0.

    Args:
        axis: matplotlib's axes of the chart.
        sent: bytes.
        quality: mean over the seeds.
        spread: the quality's standard deviation, or null.
        drawn: the method's style.
    """
    if sent:
        axis.errorbar(sent / 1e6, quality, spread, ls="none", capsize=3, **drawn)
    else:
        axis.axhline(quality, color=drawn["color"], ls=":", lw=1.5, label=drawn["label"])


def _against_bytes(axis: Any, sent: Sequence[float], metric: str, baseline: float | None) -> None:
    if any(sent):
        log_scale(axis)
    axis.set(
        xlabel="MB sent, all clients, both ways",
        ylabel=f"test {metric.replace('_', ' ')}, mean by rows",
        title="Quality against bytes sent",
    )
    _finish(axis, baseline)


def _finish(axis: Any, baseline: float | None) -> None:
    axis.grid(alpha=0.3)
    if baseline is not None:
        axis.axhline(baseline, color="grey", ls="--", lw=1, label="commonest label")


def log_scale(axis: Any) -> None:
    """Make the horizontal axis logarithmic, with plain numbers, because no text is math.

    Args:
        axis: matplotlib's axes, on which everything is drawn already.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    subs = (1, 2, 5) if high < 1000 * low else (1,)  # more would touch each other
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def plot_partition(
    paths: Sequence[Path], counts: np.ndarray, labels: Sequence[str], kind: str = "label"
) -> None:
    """Draw a heat map of the rows by client and label, coloured by their square roots.

    Args:
        paths: the picture's files, one for each format.
        counts: rows by client and label, (clients, labels).
        labels: the labels' names.
        kind: names the axis of the labels.
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
    save_figure(figure, paths, dpi=150)


def save_figure(figure: Any, paths: Sequence[Path], dpi: int) -> None:
    """Write a figure into files without a date, so that equal figures are equal files; close it.

    Args:
        figure: matplotlib's figure.
        paths: the files; their ends say the formats.
        dpi: pixels an inch of formats that have pixels.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the room is made; each file would make it again
    for path in paths:
        undated = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
        figure.savefig(path, dpi=dpi, metadata=None if path.suffix == ".png" else undated)
    pyplot().close(figure)


def _inches(cells: int, least: float, most: float, whole: float) -> float:
    """Return an axis's inches: ``least`` to ``most`` a cell, but at most ``whole`` in all."""
    return min(whole, cells * min(most, max(least, 12 / cells)))


def _name_cells(
    axis: Any, counts: np.ndarray, labels: Sequence[str], wide: float, high: float
) -> None:
    """Draw the ticks of clients and labels and, where there is room, the counts."""
    clients, classes = counts.shape
    roomy, columns = wide / classes > 0.4, _ticks(classes, wide)
    slant = {"rotation": 45, "ha": "right"} if roomy else {"rotation": 90, "fontsize": 7}
    names = shortened([labels[i] for i in columns])
    axis.set_xticks(columns, names, parse_math=False, **slant)
    axis.set_yticks(_ticks(clients, high))
    axis.tick_params(axis="y", labelsize=9 if high / clients > 0.2 else 7)
    if roomy and clients <= 40:
        for (i, j), count in np.ndenumerate(counts):
            colour = "w" if count > counts.max() / 3 else "k"
            axis.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)


def _ticks(count: int, inches: float) -> range:
    """Return every first, second, fifth, tenth ... number, at least 0.12 inches apart."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if step * inches >= 0.12 * count))


def shortened(names: Sequence[str]) -> list[str]:
    """Return names of at most 24 characters; different ones stay different."""
    return brief(names, 24)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which then needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
