"""Charts in the form of plotly.js, as dictionaries that become JSON.

They are written by hand, because plotly's Python classes take seconds to import. Its package gives
the script that draws them. Plotly reads some HTML in texts, so names are escaped.
"""

from collections.abc import Sequence
from functools import singledispatch
from html import escape
from textwrap import wrap
from typing import Any

from fedpeft.reporting.figures import COLOURS, shortened
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

Form = dict[str, Any]
BESIDE_NAMES = 26  # characters of a title, for which a phone has room beside settings' names
GREY = "rgba(128,128,128,0.35)"
MARKERS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross")  # as in figures


@singledispatch
def form(chart: Chart) -> Form:
    """Return a chart's ``data`` and ``layout``; each trace of a setting has its place in ``meta``.

    Raises:
        TypeError: the chart is of no known kind.
    """
    raise TypeError(f"{type(chart).__name__} is no kind of chart")


@form.register
def _(chart: LineChart) -> Form:
    data = [trace for line in chart.lines for trace in _line(line)]
    layout = _layout(
        _axis(chart.x, "log" if chart.log_x else "linear"), _axis(chart.y, width=UPRIGHT)
    )
    last = max((line.x[-1] for line in chart.lines), default=0)
    if chart.x == "round" and last <= 12:
        layout["xaxis"]["dtick"] = 1
    if chart.level is not None:
        place = {"x0": 0, "x1": 1, "xref": "paper", "y0": chart.level, "y1": chart.level}
        layout["shapes"] = [{"type": "line", **place, "line": {"color": "#888", "dash": "dash"}}]
        text = {"text": escape(chart.level_name), "showarrow": False, "font": {"color": "#888"}}
        at = {"x": 1, "xref": "paper", "y": chart.level, "xanchor": "right", "yanchor": "bottom"}
        layout["annotations"] = [text | at]
    return {"data": data, "layout": layout}


def _line(line: Line) -> list[Form]:
    """Return a line's traces; the edges of its band come first."""
    colour = COLOURS[line.place % len(COLOURS)]
    common = {"type": "scatter", "meta": line.place, "name": escape(line.name), "showlegend": False}
    traces: list[Form] = []
    if line.low is not None and line.high is not None:
        x, y = [*line.x, *reversed(line.x)], [*line.high, *reversed(line.low)]
        band = {"fill": "toself", "fillcolor": faded(colour, 0.18), "hoverinfo": "skip"}
        traces.append(common | band | {"x": x, "y": y, "mode": "lines", "line": {"width": 0}})
    strokes = ",".join(f"{length}px" for length in dashes(line.place))
    dash = "dash" if line.bound else strokes or "solid"
    drawn = {"x": list(line.x), "y": list(line.y), "line": {"color": colour, "dash": dash}}
    symbol = MARKERS[line.place % len(MARKERS)]
    marker = {"symbol": symbol, "size": 7, "maxdisplayed": MOST_MARKERS}
    mode = {"mode": "lines" if line.bound else "lines+markers"}
    return [*traces, common | drawn | mode | {"marker": marker}]


@form.register
def _(chart: ScatterChart) -> Form:
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "meta": place,
            "name": escape(name),
            "showlegend": False,
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "marker": {
                "color": COLOURS[place % len(COLOURS)],
                "symbol": MARKERS[place % len(MARKERS)],
                "size": 7,
            },
        }
        for name, place, points in zip(chart.names, chart.places, chart.points, strict=True)
    ]
    return {"data": data, "layout": _layout(_axis(chart.x), _axis(chart.y, width=UPRIGHT))}


@form.register
def _(chart: BoxChart) -> Form:
    data = [
        {
            "type": "box",
            "meta": place,
            "x": list(values),
            "y": [name] * len(values),
            "text": list(hover),
            "name": name,
            "orientation": "h",
            "boxpoints": "all",
            "jitter": 0.4,
            "pointpos": 0,
            "marker": {"color": COLOURS[place % len(COLOURS)], "size": 5, "opacity": 0.75},
            "line": {"width": 1.5},
            "fillcolor": faded(COLOURS[place % len(COLOURS)], 0.15),
            "showlegend": False,
        }
        for name, place, values, hover in zip(
            _ticks(chart.names), chart.places, chart.values, chart.hover, strict=True
        )
    ]
    x = _axis(chart.x, width=BESIDE_NAMES)
    layout = _layout(x, _axis("") | {"autorange": "reversed", "type": "category"})
    return {"data": data, "layout": layout | {"height": 120 + 44 * len(data)}}


@form.register
def _(chart: BarChart) -> Form:
    names = _ticks(chart.names)
    drawn = {"type": "scatter", "mode": "markers"} if chart.log_x else {"type": "bar"}
    size = {"size": 10} if chart.log_x else {}
    data = [
        {
            **drawn,
            "orientation": "h",
            "y": names,
            "x": list(values),
            "name": escape(name),
            "marker": {"color": COLOURS[place % len(COLOURS)]} | size,
            "showlegend": len(chart.bars) > 1,
        }
        for place, (name, values) in enumerate(chart.bars.items())
    ]
    y = _axis("") | {"autorange": "reversed", "type": "category"}
    layout = _layout(_axis(chart.x, "log" if chart.log_x else "linear", BESIDE_NAMES), y)
    legend = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    height = 120 + (24 + 20 * len(chart.bars)) * len(names)
    return {"data": data, "layout": layout | {"legend": legend, "height": height}}


@form.register
def _(chart: HeatChart) -> Form:
    clients, width = chart.counts.shape
    heat = {
        "type": "heatmap",
        "z": chart.counts.tolist(),
        "x": _ticks(chart.labels),
        "y": [str(client) for client in range(clients)],
        "colorscale": [[0, faded(COLOURS[0], 0.04)], [1, faded(COLOURS[0], 0.75)]],
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "client %{y}, %{x}: %{z} rows<extra></extra>",
        "colorbar": {"thickness": 10, "title": {"text": "rows"}},
    }
    if clients <= 20 and width <= 12:
        heat |= {"texttemplate": "%{z}"}
    x = _axis(chart.kind) | {"type": "category", "automargin": True, "showgrid": False}
    y = {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False}
    layout = _layout(x, _axis("client") | y)
    return {"data": [heat], "layout": layout | {"height": min(900, 180 + 26 * clients)}}


def _axis(title: str, kind: str = "linear", width: int = 99) -> Form:
    """Return an axis.

    Args:
        title: names it.
        kind: linear or log.
        width: characters of a line of the title at most.
    """
    return {
        "title": {"text": "<br>".join(map(escape, wrap(title, width))), "standoff": 8},
        "type": kind,
        "gridcolor": GREY,
        "zeroline": False,
        "linecolor": GREY,
        "automargin": True,
    }


def _layout(x: Form, y: Form) -> Form:
    return {
        "xaxis": x,
        "yaxis": y,
        "height": 360,
        "margin": {"l": 56, "r": 12, "t": 28, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "font": {"size": 12},
    }


def _ticks(names: Sequence[str]) -> list[str]:
    return [escape(name) for name in shortened(names)]


def faded(colour: str, alpha: float) -> str:
    """Return a colour, ``#rrggbb``, as CSS writes it with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
