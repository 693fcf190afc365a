"""Charts as PNG, SVG and PDF, for papers."""

from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from textwrap import fill
from typing import Any

from fedpeft.reporting.figures import (
    COLOURS,
    log_scale,
    plot_partition,
    pyplot,
    save_figure,
    shortened,
    style,
)
from fedpeft.reporting.report.chart import (
    MOST_MARKERS,
    UPRIGHT,
    BarChart,
    BoxChart,
    Chart,
    HeatChart,
    Line,
    LineChart,
    ScatterChart,
    dashes,
)

# A function imports matplotlib, because it takes a second and most reports have no pictures.

FORMATS = ("png", "svg", "pdf")
WIDTH = 7.0  # inches
# Names are no formulas, letters stay letters in PDF and SVG, and equal charts are equal files.
SETTINGS = {
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpeft",
}


def save_pictures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draw charts into a folder, each in all formats, and return the files."""
    plt = pyplot()
    with plt.rc_context(SETTINGS):
        return [path for chart in charts for path in _save(chart, folder)]


def _save(chart: Chart, folder: Path) -> list[Path]:
    paths = [folder / f"{chart.name}.{end}" for end in FORMATS]
    if isinstance(chart, HeatChart):
        plot_partition(paths, chart.counts, chart.labels, chart.kind)
        return paths
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    axis.grid(alpha=0.3)
    draw(chart, figure, axis)
    save_figure(figure, paths, dpi=200)
    return paths


@singledispatch
def draw(chart: Chart, figure: Any, axis: Any) -> None:
    """Draw a chart.

    Args:
        chart: the chart with its values.
        figure: matplotlib's figure, whose height may change.
        axis: the figure's axes.

    Raises:
        TypeError: the chart is of no known kind.
    """
    raise TypeError(f"{type(chart).__name__} is no kind of chart")


@draw.register
def _(chart: LineChart, figure: Any, axis: Any) -> None:
    for line in chart.lines:
        _draw_line(line, axis)
    if chart.level is not None:
        axis.axhline(chart.level, color="grey", ls="--", lw=1, label=chart.level_name)
    axis.set(xlabel=chart.x, ylabel=fill(chart.y, UPRIGHT))
    if chart.log_x:
        log_scale(axis)
    _name_below(figure, axis)
    rounds = sorted({x for line in chart.lines for x in line.x})
    if chart.x == "round" and len(rounds) <= 12:
        axis.set_xticks(rounds)


def _name_below(figure: Any, axis: Any) -> None:
    """Name what is drawn below a chart, and make room for it."""
    names = axis.get_legend_handles_labels()[1]
    longest = max(map(len, names), default=0)
    columns = 3 if longest < 20 else 2 if longest < 48 else 1
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=columns)
    rows = -(-len(names) // columns)
    figure.set_size_inches(WIDTH, 4.0 + 0.2 * rows)


@draw.register
def _(chart: ScatterChart, figure: Any, axis: Any) -> None:
    for name, place, points in zip(chart.names, chart.places, chart.points, strict=True):
        x, y = zip(*points, strict=True)
        axis.plot(x, y, ls="", ms=5, alpha=0.75, **style(place, name))
    axis.set(xlabel=chart.x, ylabel=fill(chart.y, UPRIGHT))
    _name_below(figure, axis)


def _draw_line(line: Line, axis: Any) -> None:
    drawn = style(line.place, line.name)
    if line.bound:
        axis.plot(line.x, line.y, ls="--", lw=1, color=drawn["color"], label=line.name)
        return
    dash = (0, dashes(line.place)) if dashes(line.place) else "-"
    every = -(-len(line.x) // MOST_MARKERS) or 1
    axis.plot(line.x, line.y, ms=4, ls=dash, markevery=every, **drawn)
    if line.low is not None and line.high is not None:
        axis.fill_between(line.x, line.low, line.high, color=drawn["color"], alpha=0.15, lw=0)


@draw.register
def _(chart: BoxChart, figure: Any, axis: Any) -> None:
    places = range(len(chart.names))
    axis.boxplot(chart.values, orientation="horizontal", positions=places, showfliers=False)
    for y, place, values in zip(places, chart.places, chart.values, strict=True):
        axis.plot(
            values, [y] * len(values), "o", ms=4, alpha=0.6, color=COLOURS[place % len(COLOURS)]
        )
    _name_rows(chart.names, 0.45, figure, axis)
    axis.set(xlabel=chart.x)


@draw.register
def _(chart: BarChart, figure: Any, axis: Any) -> None:
    high = 0.8 / len(chart.bars)
    for place, (name, values) in enumerate(chart.bars.items()):
        at = [y - 0.4 + high * (place + 0.5) for y in range(len(chart.names))]
        if chart.log_x:
            axis.plot(values, at, "o", ms=7, color=COLOURS[place], label=name)
        else:
            axis.barh(at, values, height=high, color=COLOURS[place], label=name)
    _name_rows(chart.names, 0.3 + 0.15 * len(chart.bars), figure, axis)
    axis.set(xlabel=chart.x)
    if chart.log_x:
        log_scale(axis)
    if len(chart.bars) > 1:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)


def _name_rows(names: Sequence[str], inches: float, figure: Any, axis: Any) -> None:
    """Name the rows of a chart from top to bottom, and make room for them.

    Args:
        names: the settings' names, from top to bottom.
        inches: height of a row.
        figure: matplotlib's figure, whose height changes.
        axis: the figure's axes.
    """
    axis.set_yticks(range(len(names)), shortened(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    figure.set_size_inches(WIDTH, min(60.0, 1.2 + inches * len(names)))
