"""The charts of a report, made from its runs."""

from collections.abc import Sequence

from fedpeft.config.choices import choices
from fedpeft.reporting.report.chart import BarChart, BoxChart, Chart, Line, LineChart
from fedpeft.reporting.report.clients import last_round
from fedpeft.reporting.report.diagnostics import DIAGNOSTICS
from fedpeft.reporting.report.held import held_charts
from fedpeft.reporting.report.related import related_charts
from fedpeft.reporting.report.series import Curve, Points, in_lines, megabytes, summed
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.results import OWN_TEST
from fedpeft.reporting.saved_runs import SavedRun

MOST_POINTS = 300  # points of a setting; each is drawn in three files and has a text on the page
BAND = "Lines are means over the seeds, bands the mean ± the sample standard deviation"


def charts(runs: Runs) -> list[tuple[str, list[Chart]]]:
    """Return the charts by section; a chart that the runs have no values for is left out."""
    sections: dict[str, list[Chart | None]] = {
        "Quality": [_by_round(runs), _by_megabytes(runs), _by_client(runs)],
        "Cost": [_bytes(runs), _seconds(runs)],
        "Diagnostics": [
            *(_by_key(runs, key) for key in DIAGNOSTICS),
            _moved(runs),
            *related_charts(runs),
        ],
        "Who holds what": list(held_charts(runs)),
    }
    return [(name, [c for c in made if c is not None]) for name, made in sections.items()]


# --- quality -------------------------------------------------------------------------------------


def _quality_key(runs: Runs) -> tuple[str, str]:
    """Return the entry of the lines that is drawn, and its name.

    It is the first that has a value in two rounds, because texts may be generated after the last
    round alone.
    """
    clients, server = "clients' test rows, mean by rows", "the server's validation rows"
    forced = runs.measure.replace("_generated", "_teacher_forced")
    keys = {f"{OWN_TEST}{name}": f"{name} on {clients}" for name in (runs.measure, forced)}
    keys |= {f"validation_{name}": f"{name} on {server}" for name in (runs.measure, forced)}
    keys["validation_loss"] = f"loss on {server}"
    counted = {key: _most_rounds(runs, key) for key in keys}
    key = next((key for key in keys if counted[key] > 1), max(keys, key=lambda k: counted[k]))
    return key, keys[key].replace("_", " ")


def _most_rounds(runs: Runs, key: str) -> int:
    return max(len(in_lines(key)(run)) for setting in runs.settings for run in setting.runs)


def _level(runs: Runs, key: str) -> float | None:
    """Return the height of the commonest label's line; null if the chart is not of test rows."""
    tested = key.removeprefix("client_") == f"test_{runs.measure}"
    return common_baseline(runs) if tested else None


def _by_round(runs: Runs) -> LineChart | None:
    key, axis = _quality_key(runs)
    level = _level(runs, key)
    lines = _lines(runs, key)
    notes = _line_notes(runs, lines, f"had no {key}")
    return LineChart(
        "quality_by_round",
        f"{runs.title.capitalize()} by round",
        "round",
        axis,
        lines,
        level,
        "commonest label",
        notes=notes,
    )


def _by_megabytes(runs: Runs) -> LineChart | None:
    key, axis = _quality_key(runs)
    lines: list[Line] = []
    for place, setting in enumerate(runs.settings):
        curve, sent = Curve.of(setting, in_lines(key)), Curve.of(setting, megabytes)
        sizes = dict(zip(sent.rounds, sent.means, strict=True))
        if curve.rounds:
            x = [sizes[number] for number in curve.rounds]
            lines.append(Line(setting.name, place, x, curve.means, curve.low, curve.high))
    sizes = [x for line in lines for x in line.x if x > 0]
    last = [line.x[-1] for line in lines if line.x[-1] > 0]
    log = bool(last) and max(last) > 10 * min(last)
    notes = ["Training's messages of all clients, in both directions, summed up to each round."]
    if log:
        lines = [line for line in (_from(line, min(sizes)) for line in lines) if line.x]
        notes.append("The axis is logarithmic, so round 0, before anything is sent, is not shown.")
    return LineChart(
        "quality_by_megabytes",
        f"{runs.title.capitalize()} by megabytes on the wire",
        "MB on the wire, all clients, both ways",
        axis,
        lines,
        _level(runs, key),
        "commonest label",
        log,
        notes=notes,
    )


def _from(line: Line, least: float) -> Line:
    """Return a line without its points at which x is smaller."""
    keep = [i for i, x in enumerate(line.x) if x >= least]
    x, y, low, high = (
        None if values is None else [values[i] for i in keep]
        for values in (line.x, line.y, line.low, line.high)
    )
    return Line(line.name, line.place, x or [], y or [], low, high)


def common_baseline(runs: Runs) -> float | None:
    """Return the score of the commonest label if it is the same in all settings."""
    means = [setting.spread("baseline")[0] for setting in runs.settings]
    first = means[0]
    return first if first is not None and all(m == first for m in means) else None


def _by_client(runs: Runs) -> BoxChart | None:
    whole = [last_round(setting, runs.measure) for setting in runs.settings]
    measured = [thinned(values) for values in whole]
    lacking = [s.name for s, values in zip(runs.settings, measured, strict=True) if not values]
    if len(lacking) == len(measured):
        return None
    shown = [(place, values) for place, values in enumerate(measured) if values]
    notes = ["Each point is a client of one seed, after the last round in which clients measured."]
    if (most := max(map(len, whole))) > MOST_POINTS:
        notes.append(
            f"Of a setting's clients ({most} at most), {MOST_POINTS} are drawn, evenly spaced in "
            "the order of their values, and the box is of these."
        )
    if lacking:
        notes.append(f"No client's measures were saved by: {', '.join(lacking)}.")
    return BoxChart(
        "clients",
        f"{runs.title.capitalize()} by client",
        f"{runs.title} on the client's own test rows",
        [runs.settings[place].name for place, _ in shown],
        [place for place, _ in shown],
        [[value for value, _ in values] for _, values in shown],
        [[text for _, text in values] for _, values in shown],
        notes=notes,
    )


def thinned(values: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return at most ``MOST_POINTS`` values with their texts, with the least and the greatest."""
    if len(values) <= MOST_POINTS:
        return values
    ranked = sorted(values)
    last = len(ranked) - 1
    return [ranked[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


# --- lines ---------------------------------------------------------------------------------------


def _lines(runs: Runs, key: str) -> list[Line]:
    curves = [(s.name, i, Curve.of(s, in_lines(key))) for i, s in enumerate(runs.settings)]
    return [
        Line(name, place, curve.rounds, curve.means, curve.low, curve.high)
        for name, place, curve in curves
        if curve.rounds
    ]


def _line_notes(runs: Runs, lines: Sequence[Line], lacking: str) -> list[str]:
    drawn = {line.place for line in lines}
    seeds = sorted({len(setting.runs) for setting in runs.settings})
    counted = " to ".join(map(str, (seeds[0], seeds[-1])[: len(seeds)]))
    notes = [f"{BAND} ({counted} seeds)." if seeds[-1] > 1 else "One seed, so there is no band."]
    if unequal := [s.name for s in runs.settings if len({len(r.lines) for r in s.runs}) > 1]:
        notes.append(f"A line ends where its first seed ended: {', '.join(unequal)}.")
    if missing := [s.name for i, s in enumerate(runs.settings) if i not in drawn]:
        notes.append(f"Not drawn, because no round {lacking}: {', '.join(missing)}.")
    return notes


def _by_key(runs: Runs, key: str) -> LineChart | None:
    """Draw a diagnostic by round; null if no round has it."""
    lines, drawn = _lines(runs, key), DIAGNOSTICS[key]
    notes = [drawn.meaning, *_line_notes(runs, lines, drawn.lacking)]
    chart = LineChart(drawn.chart, drawn.title, "round", drawn.axis, lines, notes=notes)
    return chart if lines else None


# --- the linear bound ----------------------------------------------------------------------------


def _moved(runs: Runs) -> LineChart | None:
    """Draw how far the shared parameters can have moved, and a bound of it where one is known."""
    lines: list[Line] = []
    bounds: list[Line] = []
    for place, setting in enumerate(runs.settings):
        curve = Curve.of(setting, summed("update_norm_mean"))
        if not curve.rounds:
            continue
        x, y = [0, *curve.rounds], [0.0, *curve.means]
        low, high = ([0.0, *edge] if edge else None for edge in (curve.low, curve.high))
        lines.append(Line(setting.name, place, x, y, low, high))
        bound = Curve.of(setting, norm_bound)
        if bound.rounds:
            ends = [0, *bound.rounds], [0.0, *bound.means]
            bounds.append(Line(f"{setting.name}, bound", place, *ends, bound=True))
    notes = [
        "Norms of the rounds, summed up: with FedAvg at equal weights, and a method whose "
        "aggregate is the mean, the shared parameters have moved no further from their start. "
        "Lemma 1 of arXiv 2412.07021 bounds the norm of sequential "
        "compression layers by B + η G (rounds x local steps), a straight line.",
        _bound_note(len(bounds), len(lines)),
    ]
    title, axis = "Update norms, summed up", "sum of mean update norms"
    made = [*lines, *bounds]
    return LineChart("moved", title, "round", axis, made, notes=notes) if lines else None


def norm_bound(run: SavedRun) -> Points:
    """Return η G x steps up to each round, where the configuration says what η G is at most.

    With plain SGD and clipped gradients a step's norm is at most lr x max_grad_norm. Only FedAvg is
    known to add no step of the server's, and to take no more steps a round than the clients'.
    """
    get = run.settings.get
    plain = get("optimizer.name") == "sgd" and not (
        get("optimizer.momentum") or get("optimizer.weight_decay")
    )
    plain = plain and choices(run.settings)["strategy"] == "fedavg"
    clip, steps = get("optimizer.max_grad_norm"), get("local_steps")
    if not plain or clip is None or steps is None:
        return {}
    step = get("lr", 0.0) * clip * steps
    return {line["round"]: step * line["round"] for line in run.lines if line["round"] > 0}


def _bound_note(bounds: int, lines: int) -> str:
    unknown = (
        "G, the largest norm of a gradient, is not recorded, and an adaptive optimizer's step is "
        "not bounded by η G; it is known with strategy=fedavg, "
        "optimizer.name=sgd, no momentum, no weight decay and clipped gradients"
    )
    if not bounds:
        return f"The bound is not drawn: {unknown}. A line that bends upwards grows faster."
    drawn = "Dashed: η G x steps, where G is at most optimizer.max_grad_norm"
    return (
        f"{drawn}." if bounds == lines else f"{drawn}. For the others it is not drawn: {unknown}."
    )


# --- cost ----------------------------------------------------------------------------------------


def _bytes(runs: Runs) -> BarChart:
    bars = {
        way: [setting.mean_bytes(key) / 1e6 for setting in runs.settings]
        for way, key in (("up", "uplink_bytes"), ("down", "downlink_bytes"))
    }
    sizes = [size for values in bars.values() for size in values if size > 0]
    log = bool(sizes) and max(sizes) > 50 * min(sizes)
    notes = ["Training's messages of the whole run, all clients, mean over the seeds."]
    if log:
        notes.append("The axis is logarithmic, so there are points for bars, and none for a 0.")
    names = [setting.name for setting in runs.settings]
    return BarChart("bytes", "Megabytes up and down", "MB", names, bars, log, notes=notes)


def _seconds(runs: Runs) -> BarChart:
    values = [setting.spread("seconds")[0] or 0.0 for setting in runs.settings]
    notes = [
        "Whole runs, mean over the seeds. They compare only where all ran on like machines that "
        "did nothing else."
    ]
    names = [setting.name for setting in runs.settings]
    return BarChart("seconds", "Seconds of a run", "s", names, {"seconds": values}, notes=notes)
