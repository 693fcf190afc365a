"""Charts as data, which ``plotly_form`` and ``pictures`` draw: lines, points, boxes, bars, maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpeft.reporting.figures import COLOURS

MOST_MARKERS = 60  # markers of a line; more would hide it
UPRIGHT = 40  # characters of a line of the y axis' title, for which its height has room
# Lengths of strokes and gaps. Colours repeat after ten settings, and a line then has other dashes.
DASHES = ((), (2, 2), (9, 3), (9, 3, 2, 3))


def dashes(place: int) -> tuple[int, ...]:
    """Return the lengths of strokes and gaps of a setting's line; none for an unbroken one."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


@dataclass(frozen=True)
class Chart:
    """A chart's texts.

    Args:
        name: name of the chart's files, without an ending.
        title: stands above it.
        notes: sentences below it.
    """

    name: str
    title: str
    notes: Sequence[str] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Line:
    """A setting's line, with a band where there is a spread.

    Args:
        name: the setting's name.
        place: the setting's place among all settings, which decides colour, marker and
            dashes.
        x: values, ascending.
        y: values.
        low: lower edge of the band; null for no band.
        high: upper edge of the band; null for no band.
        bound: true for a bound, which is dashed and has no markers.
    """

    name: str
    place: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    bound: bool = False


@dataclass(frozen=True)
class LineChart(Chart):
    """Lines over a common axis.

    Args:
        x: names the horizontal axis.
        y: names the vertical axis.
        lines: the settings' lines.
        level: height of a grey line, or null.
        level_name: name of the grey line.
        log_x: true for a logarithmic horizontal axis.
    """

    x: str
    y: str
    lines: Sequence[Line]
    level: float | None = None
    level_name: str = ""
    log_x: bool = False


@dataclass(frozen=True)
class ScatterChart(Chart):
    """Points of each setting, one a run.

    Args:
        x: names the horizontal axis.
        y: names the vertical axis.
        names: the settings' names.
        places: the settings' places among all settings, which decide colours and markers.
        points: each setting's points, (x, y).
    """

    x: str
    y: str
    names: Sequence[str]
    places: Sequence[int]
    points: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class BoxChart(Chart):
    """A box and its points for each setting, one below the other.

    Args:
        x: names the axis of the values.
        names: the settings' names.
        places: the settings' places among all settings, which decide colours.
        values: each setting's values.
        hover: a text for each value.
    """

    x: str
    names: Sequence[str]
    places: Sequence[int]
    values: Sequence[Sequence[float]]
    hover: Sequence[Sequence[str]]


@dataclass(frozen=True)
class BarChart(Chart):
    """Bars for each setting, one below the other, or points where the axis is logarithmic.

    A bar's length has no meaning on a logarithmic axis, because the axis has no 0.

    Args:
        x: names the axis of the values.
        names: the settings' names.
        bars: values of each setting, by the bar's name.
        log_x: true for a logarithmic axis.
    """

    x: str
    names: Sequence[str]
    bars: Mapping[str, Sequence[float]]
    log_x: bool = False


@dataclass(frozen=True)
class HeatChart(Chart):
    """Rows by client and label.

    Args:
        counts: rows, (clients, labels).
        labels: the labels' names.
        kind: names the axis of the labels.
    """

    counts: np.ndarray
    labels: Sequence[str]
    kind: str
