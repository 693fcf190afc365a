"""The comparison's picture: quality against megabytes sent, every point with its name."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparison_page import TITLES
from comparison_rows import BASELINE, SHARE, Result, Row, rows, threshold
from comparison_run import BOUNDS, DATA_SETS

from fedpeft.reporting.tables import pyplot

DPI, FONT = 130, 8.5
GAP = 1.35 * FONT * DPI / 72  # pixels from one line of text to the next
LINE = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 0}
PIXELS = {"xycoords": "figure pixels", "textcoords": "figure pixels", "annotation_clip": False}


class Box(NamedTuple):
    """A rectangle of pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, wide: float, high: float) -> "Box":
        """By its centre and size."""
        return cls(x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)

    def meets(self, other: "Box") -> bool:
        """Whether they overlap."""
        wide = self.left < other.right and other.left < self.right
        return wide and self.bottom < other.top and other.bottom < self.top

    def within(self, other: "Box") -> bool:
        """Whether no part of it is outside of the other."""
        wide = self.left >= other.left and self.right <= other.right
        return wide and self.bottom >= other.bottom and self.top <= other.top

    def line_from(self, x: float, y: float) -> list["Box"]:
        """Small boxes along the line from a point to the nearest of its own points."""
        right = min(max(x, self.left), self.right) - x
        up = min(max(y, self.bottom), self.top) - y
        count = int(math.hypot(right, up) / 4)
        return [Box.around(x + right * i / count, y + up * i / count, 3, 3) for i in range(count)]


class Taken(NamedTuple):
    """What is on a panel: points and names, which nothing may cover, and lines, which may be."""

    solid: list[Box]
    lines: list[Box]

    def cost(self, name: Box, line: Sequence[Box]) -> float:
        """Of a name and the line to it, in pixels that it is worth to go further away."""
        covered = sum(name.meets(other) for other in self.solid)
        touched = sum(name.meets(other) for other in self.lines)
        crossed = sum(part.meets(other) for part in line for other in self.solid + self.lines)
        return 300 * covered + 15 * touched + 6 * crossed


def draw(path: Path, result: Result) -> None:
    """Saves a panel a data set, one below the other."""
    plt = pyplot()
    figure, axes = plt.subplots(len(DATA_SETS), figsize=(11, 6.5 * len(DATA_SETS)), dpi=DPI)
    figure.subplots_adjust(left=0.065, right=0.85, top=0.97, bottom=0.045, hspace=0.16)
    colours = {name: f"C{i}" for i, name in enumerate(sorted(result.chosen))}
    for axis, data in zip(axes, DATA_SETS, strict=True):
        panel(axis, result, data, colours)
    figure.savefig(path)
    plt.close(figure)


def panel(axis: Any, result: Result, data: str, colours: dict[str, str]) -> None:
    """One data set: means over the seeds, whose standard deviation is the bar."""
    found = [row for row in rows(result, data) if row.quality is not None]
    axis.set(xscale="log", xlabel="MB sent, all clients, both ways", title=TITLES[data])
    axis.set_ylabel("clients' own test rows: mean ± standard deviation")
    axis.grid(alpha=0.25)
    axis.margins(0.07, 0.05)
    points = {row.method: (row.bytes / 1e6, row.quality) for row in found if row.bytes is not None}
    for row in found:
        if row.method in points:
            colour = colours[row.method]
            style = {"fmt": "o", "ms": 5, "lw": 0.7, "ecolor": (colour, 0.5), "zorder": 3}
            axis.errorbar(*points[row.method], row.quality_sd, color=colour, **style)
    draw_levels(axis, levels(result, data, found))
    spots = {name: tuple(axis.transData.transform(point)) for name, point in points.items()}
    taken = Taken(
        [Box.around(x, y, 0.7 * GAP, 0.7 * GAP) for x, y in spots.values()],
        [bar(axis, row) for row in found if row.method in spots],
    )
    for name, (x, y) in spots.items():
        write_name(axis, result.label(name), x, y, colours[name], taken)


def bar(axis: Any, row: Row) -> Box:
    """Where a point's error bar is."""
    x, deviation = (row.bytes or 0) / 1e6, row.quality_sd or 0
    ends = ((x, (row.quality or 0) + sign * deviation) for sign in (-1, 1))
    (left, bottom), (_, top) = map(axis.transData.transform, ends)
    return Box(left - 1, bottom, left + 1, top)


def levels(result: Result, data: str, found: Sequence[Row]) -> list[tuple[float, str]]:
    """Qualities without bytes, with their names, the lowest first."""
    goal = threshold(result, data)
    named = [] if goal is None else [(goal, f"{SHARE * 100:g} % of LoRA")]
    names = {BASELINE: "commonest label"} | {name: name for name in BOUNDS}
    named += [(row.quality or 0, names[row.method]) for row in found if row.method in names]
    return sorted(named)


def draw_levels(axis: Any, given: Sequence[tuple[float, str]]) -> None:
    """Dashed lines, with their names beside the panel, pushed apart where they are near."""
    for quality, _ in given:
        axis.axhline(quality, color="0.45", ls="--", lw=0.9, zorder=1)
    axis.figure.canvas.draw()  # sets the limits, which stay
    at = -math.inf
    for quality, name in given:
        right, y = axis.bbox.x1, axis.transData.transform((1, quality))[1]
        at = max(y, at + GAP)
        text, style = f"{name} {quality:.3f}", {"fontsize": FONT, "color": "0.3", "va": "center"}
        line = LINE | {"color": "0.45"}
        axis.annotate(text, (right, y), (right + GAP, at), arrowprops=line, **PIXELS, **style)


def write_name(axis: Any, text: str, x: float, y: float, colour: str, taken: Taken) -> None:
    """Writes a name where it costs least, with a line to its point; both then are taken."""
    from matplotlib.patheffects import withStroke

    style = {"fontsize": FONT, "color": colour, "ha": "center", "va": "center", "zorder": 4}
    line = LINE | {"color": colour}
    name = axis.annotate(text, (x, y), (x, y), arrowprops=line, **PIXELS, **style)
    size, panel = name.get_window_extent(), Box(*axis.bbox.extents)
    name.set_path_effects([withStroke(linewidth=2, foreground="white")])
    box = cheapest(places(x, y, size.width, size.height), x, y, taken, panel)
    name.set_position(((box.left + box.right) / 2, (box.bottom + box.top) / 2))
    taken.solid.append(box)
    taken.lines.extend(box.line_from(x, y))


def cheapest(
    places: Iterator[tuple[float, Box]], x: float, y: float, taken: Taken, panel: Box
) -> Box:
    """The place of least cost, which grows with its distance."""
    best, least = Box(x, y, x, y), math.inf
    for distance, box in places:
        if distance >= least:
            break
        line = box.line_from(x, y)[3:]  # without what lies on the point itself
        if box.within(panel) and (cost := distance + taken.cost(box, line)) < least:
            best, least = box, cost
    return best


def places(x: float, y: float, wide: float, high: float) -> Iterator[tuple[float, Box]]:
    """Boxes all around a point, nearer ones first, with their distances from it."""
    for distance in range(8, 400, 6):
        for angle in (turn * math.tau / 32 for turn in range(32)):
            right, up = math.cos(angle), math.sin(angle)
            yield (
                distance,
                Box.around(
                    x + right * (distance + wide / 2), y + up * (distance + high / 2), wide, high
                ),
            )
