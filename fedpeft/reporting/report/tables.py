"""The tables of a report, made from its runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.reporting.brief import below, brief
from fedpeft.reporting.inputs import mixed
from fedpeft.reporting.report.commands import command
from fedpeft.reporting.report.diagnostics import WITH_QUALITY, over_rounds
from fedpeft.reporting.report.pairs import FEWEST, LEVEL, paired_tests, unsaved_partitions
from fedpeft.reporting.report.related import correlation
from fedpeft.reporting.report.settings import ROWS, Runs
from fedpeft.reporting.report.table import Table, Text, megabytes, number, p_text, plain, spread
from fedpeft.reporting.results import mean_and_sd
from fedpeft.reporting.saved_runs import differing
from fedpeft.reporting.tables import Rows, seeds_text

# Columns of the summary: mean over the seeds, and the sample standard deviation beside it.
SPREAD_COLUMNS = {
    "quality": "mean by rows",
    "quality_unweighted": "mean by client",
    "quality_worst": "worst client",
    "quality_p10": "10th percentile",
    "global_test": "server's test rows",
    "baseline": "commonest label",
    "validation": "validation",
}
# Names of the tables of paired tests, by the rows that are measured.
PAIRS = {"quality": "pairs", "global_test": "pairs_on_the_servers_rows"}
SHOWN = 6  # pairs or runs that a note names, at most


def summary_table(runs: Runs) -> Table:
    """Return the quality, bytes, parameters and seconds of each setting."""
    rows: Rows = []
    for setting in runs.settings:
        row: dict[str, Any] = {"setting": setting.name, "seeds": len(setting.runs)}
        row["of"] = len(setting.runs) + setting.lost
        for key in (*SPREAD_COLUMNS, "bytes", "trained", "seconds"):
            row[key], row[f"{key}_sd"] = setting.spread(key)
        row["trained"] = max(setting.values("trained"))
        del row["trained_sd"]
        rows.append(row)
    rows.sort(key=lambda row: _rank(row[runs.compared], runs.sign))
    shown = [key for key in SPREAD_COLUMNS if any(row[key] is not None for row in rows)]
    columns: dict[str, Text] = {
        "setting": plain("setting"),
        "seeds": lambda row: seeds_text(row["seeds"], row["of"]),
    }
    columns |= {SPREAD_COLUMNS[key]: spread(key) for key in shown}
    columns |= {
        "MB in all": megabytes("bytes"),
        "parameters": number("trained", ","),
        "s": number("seconds", ".0f"),
    }
    title = f"{runs.title.capitalize()} after the last round"
    return Table("summary", title, columns, rows, _summary_notes(runs))


def _summary_notes(runs: Runs) -> list[str]:
    untested = [s.name for s in runs.settings if not s.values("quality")]
    notes = [
        "Mean ± sample standard deviation over the seeds; one seed has no deviation.",
        f"{runs.title.capitalize()} on the clients' own test rows: mean by rows weighs each client "
        "by the rows that it measured on (at most evaluation.max_client_rows), mean by client "
        "counts each alike, and nine of ten clients are as good as the 10th percentile or better. "
        "Server's test rows: one model, measured by the server; none where parameters stay on the "
        "clients. Commonest label: always answering it. Validation: on the clients' own validation "
        "rows, mean by rows.",
        "The order is that of test rows, which may choose nothing. Where settings differ in a "
        "value that was searched, such as lr, choose it by validation; fedpeft study does.",
        "MB in all: 10^6 bytes of training's messages, all clients, both ways. Parameters: trained "
        "by a client, in the round that trains most. s: seconds of the whole run.",
    ]
    if failed := [s.name for s in runs.settings if s.lost]:
        notes.append(f"Means are over the seeds that came to their end: {_named(failed)}.")
    if partly := runs.partly_measured:
        notes.append(f"Counted without the clients that measured nothing: {_named(partly)}.")
    notes += mixed(run.inputs for setting in runs.settings for run in setting.runs)
    if untested:
        notes.append(
            f"Clients' test rows were not measured (evaluation.clients=always does): "
            f"{', '.join(untested)}."
        )
    return notes


def _rank(value: float | None, sign: int) -> tuple[bool, float]:
    """Return a sort key: the best value comes first, unknown ones come last."""
    return value is None, -sign * (value or 0.0)


def _named(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def pairs_tables(runs: Runs) -> list[Table]:
    """Return the paired tests on each kind of test rows; none if there is one setting only."""
    if len(runs.settings) < 2:
        return []
    known = [key for key in PAIRS if any(setting.values(key) for setting in runs.settings)]
    return [_pairs_table(runs, key) for key in known]


def _pairs_table(runs: Runs, key: str) -> Table:
    rows, untested = paired_tests(runs, key)
    columns: dict[str, Text] = {
        "setting": plain("a"),
        "against": plain("b"),
        "seeds": plain("n"),
        "mean difference": number("difference", "+.3f"),
        f"{LEVEL:.0%} interval": lambda row: f"{row['low']:+.3f} to {row['high']:+.3f}",
        "p": lambda row: p_text(row["p"]),
        "p by Holm": lambda row: p_text(row["p_holm"]),
    }
    notes = [
        f"{runs.title.capitalize()} on {ROWS[key]}: differences by seed, two-sided paired "
        f"t-test. A pair of settings is tested if {FEWEST} seeds or more are common and have the "
        "same rows by client.",
    ]
    if rows:
        notes.append(
            f"The p by Holm is corrected for the {len(rows)} comparisons of this table alone; the "
            "interval is of one comparison."
        )
    if rows and (older := unsaved_partitions(runs)):
        notes.append(
            f"{older} of the runs are of an earlier version, which did not save who holds which "
            "rows; the same data and the same keys of the partition stand for it there."
        )
    few = min((row["n"] for row in rows), default=FEWEST)
    if rows and few < 6:
        notes.append(
            f"{few} seeds are few: the test takes the differences as normally distributed, which "
            "so few cannot show, and it finds only large ones."
        )
    notes += [f"Not tested, because {why}: {_named(pairs)}." for why, pairs in untested.items()]
    return Table(PAIRS[key], f"Differences on {ROWS[key]}", columns, rows, notes, texts=2)


def cost_table(runs: Runs) -> Table:
    """Return bytes, parameters and seconds of each setting."""
    rows: Rows = []
    for setting in runs.settings:
        summary = setting.runs[0].final_summary
        counts = summary["parameters"]
        sizes = {
            key: setting.mean_bytes(key)
            for key in (
                *("uplink_bytes", "downlink_bytes"),
                *("evaluation_uplink_bytes", "evaluation_downlink_bytes"),
            )
        }
        rows.append(
            {
                "setting": setting.name,
                "total_parameters": counts["total"],
                "trained": counts["trained"][1],
                "sent_up": _most(counts, "sent_up"),
                "sent_down": _most(counts, "sent_down"),
                "bytes_up_per_client_round": _most(counts, "bytes_up"),
                "bytes_down_per_client_round": _most(counts, "bytes_down"),
                **sizes,
                "seconds": setting.spread("seconds")[0],
            }
        )
    columns: dict[str, Text] = {
        "setting": plain("setting"),
        "trained": number("trained", ","),
        "of the model": lambda row: f"{row['trained'] / row['total_parameters']:.3%}",
        "sent up": number("sent_up", ","),
        "sent down": number("sent_down", ","),
        "MB up": megabytes("uplink_bytes"),
        "MB down": megabytes("downlink_bytes"),
        "MB to evaluate": lambda row: f"{_evaluation(row) / 1e6:.2f}",
        "s": number("seconds", ".0f"),
    }
    notes = [
        "Parameters that a client trains, sends and gets, in the round that has most. MB: 10^6 "
        "bytes of the whole run's messages, all clients, mean over the seeds; to evaluate: both "
        "ways, beside training's."
    ]
    return Table("cost", "Parameters, bytes and seconds", columns, rows, notes)


def _most(counts: Mapping[str, Any], key: str) -> int | None:
    """Return a count in the round that has most; null if an older run did not save it."""
    return counts[key][1] if key in counts else None


def _evaluation(row: Mapping[str, Any]) -> float:
    return row["evaluation_uplink_bytes"] + row["evaluation_downlink_bytes"]


def diagnostics_table(runs: Runs) -> Table | None:
    """Return each setting's diagnostics, mean over the rounds; null if no run has any."""
    values: dict[str, list[list[float]]] = {
        key: [
            [value for run in setting.runs if (value := over_rounds(run, key)) is not None]
            for setting in runs.settings
        ]
        for key in WITH_QUALITY
    }
    known = [key for key, of_settings in values.items() if any(of_settings)]
    rows: Rows = [{"setting": setting.name} for setting in runs.settings]
    for key in known:
        for row, of_seeds in zip(rows, values[key], strict=True):
            row[key], row[f"{key}_sd"] = mean_and_sd(of_seeds)
    columns: dict[str, Text] = {"setting": plain("setting")}
    columns |= {WITH_QUALITY[key].name: spread(key) for key in known}
    notes = [
        "Mean over the rounds that have it, then mean ± sample standard deviation over the seeds.",
        *(WITH_QUALITY[key].meaning for key in known),
        *(correlation(runs, key) for key in known),
    ]
    return Table("diagnostics", "Diagnostics", columns, rows, notes) if known else None


def differences_table(runs: Runs) -> Table | None:
    """Return the keys that are not the same in all settings; null if there is one setting."""
    firsts = [setting.runs[0] for setting in runs.settings]
    keys = [key for key in differing(firsts) if key != "seed"]
    if not keys:
        return None
    names = [setting.name for setting in runs.settings]
    rows: Rows = []
    short: dict[str, list[str]] = {}
    for key in keys:
        values = [_value(run.settings, key) for run in firsts]
        rows.append({"key": key} | dict(zip(names, values, strict=True)))
        short[key] = brief(values)
    columns: dict[str, Text] = {"key": plain("key")}
    for place, name in enumerate(names):
        columns[name] = lambda row, place=place: short[row["key"]][place]
    notes = ["All other keys that can change a result are the same. A dash: there is no such key."]
    if any(
        values != list(row.values())[1:] for values, row in zip(short.values(), rows, strict=True)
    ):
        notes.append("Long values are shortened (…); differences.csv has them whole.")
    return Table("differences", "Keys that differ", columns, rows, notes, texts=len(columns))


def _value(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "-"
    return "null" if settings[key] is None else str(settings[key])


def runs_table(runs: Runs) -> Table:
    """Return every counted run with its command."""
    rows: Rows = [
        {
            "setting": setting.name,
            "seed": run.settings["seed"],
            "quality": values[runs.compared],
            "seconds": values["seconds"],
            "sha256": run.final_summary.get("shared_state_sha256"),
            "directory": str(run.path),
            "command": command(run),
        }
        for setting in runs.settings
        for run, values in zip(setting.runs, setting.rows, strict=True)
    ]
    folder, inside = _below(rows)
    columns: dict[str, Text] = {
        "setting": plain("setting"),
        "seed": plain("seed"),
        "directory": inside,
        "command": plain("command"),
        runs.title: number("quality", ".3f"),
        "s": number("seconds", ".0f"),
    }
    notes = [
        *folder,
        "The command is without run_dir, and paths in it are relative to the folder where it was "
        "given. The CSV has the hash of the shared state, too.",
    ]
    long = ("directory", "command")
    return Table(
        "runs",
        "Runs and their commands",
        columns,
        rows,
        notes,
        texts=4,
        long=long,
        code=("command",),
    )


def left_out_table(runs: Runs) -> Table | None:
    """Return the runs that no number counts; null if there is none."""
    if not runs.left_out:
        return None
    rows: Rows = [
        {"directory": str(run.path), "state": status, "reason": reason}
        for run, status, reason in runs.left_out
    ]
    notes, inside = _below(rows)
    columns = {"directory": inside, "state": plain("state"), "reason": plain("reason")}
    return Table("left_out", "Runs that are not counted", columns, rows, notes, texts=3)


def _below(rows: Rows) -> tuple[list[str], Text]:
    """Return a note on the folder of all directories, and the text of one of them inside it."""
    paths = [row["directory"] for row in rows]
    folder, inside = below(paths)
    short = dict(zip(paths, inside, strict=True))
    return [f"Directories are below {folder}."] if folder else [], lambda row: short[
        row["directory"]
    ]
