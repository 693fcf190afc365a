"""``fedpeft report``: reads saved runs, and writes the page, the figures and the tables."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedpeft.files import read_json, replacing
from fedpeft.reporting.report.charts import charts
from fedpeft.reporting.report.page import Section, html
from fedpeft.reporting.report.pictures import save_pictures
from fedpeft.reporting.report.published import published_table
from fedpeft.reporting.report.settings import Runs
from fedpeft.reporting.report.table import Table
from fedpeft.reporting.report.tables import (
    cost_table,
    diagnostics_table,
    differences_table,
    left_out_table,
    pairs_tables,
    runs_table,
    summary_table,
)
from fedpeft.reporting.saved_runs import saved_runs

PAGE, FIGURES, TABLES = "report.html", "figures", "tables"
# Names the files of the last report, the only ones that a new one removes.
WRITTEN = ".written.json"
NO_COUNTS = (
    "No run saved the rows by client and label: runs of earlier versions did not, and a server "
    "does not know the rows that sites hold alone. fedpeft partition shows them for a "
    "configuration."
)
NO_CLIENTS = (
    "No client measured itself (evaluation.clients=always lets it), or no run saved its table of "
    "clients (clients.parquet), so clients are not shown apart."
)


def write_report(folders: Sequence[Path], to: Path) -> list[Path]:
    """Write a report of saved runs.

    Args:
        folders: folders of runs, studies or sweeps.
        to: takes ``report.html``, ``figures`` and ``tables``; files of the same names there are
            replaced, and others that an earlier report wrote there are removed.

    Returns:
        The files.

    Raises:
        ValueError: a folder holds no run, no run came to its end, or the runs have no measure in
            common.
    """
    runs = Runs.of(saved_runs(folders))
    sections = _sections(runs)
    for name in (FIGURES, TABLES):
        (to / name).mkdir(parents=True, exist_ok=True)
    page = to / PAGE
    with replacing(page) as draft:
        draft.write_text(html(runs, sections), encoding="utf-8")
    pictures = save_pictures([c for s in sections for c in s.charts], to / FIGURES)
    tables = [path for s in sections for t in s.tables for path in t.save(to / TABLES)]
    _remove_older(to, [*pictures, *tables])
    return [page, *pictures, *tables]


def _remove_older(to: Path, written: Sequence[Path]) -> None:
    """Remove the files of an earlier report that this one has not, and note this one's."""
    listed = to / WRITTEN
    before = read_json(listed) if listed.exists() else []
    new = {path.relative_to(to).as_posix() for path in written}
    for name in sorted(set(before) - new):
        path = Path(name)
        if path.parent.name in (FIGURES, TABLES) and len(path.parts) == 2:
            (to / path).unlink(missing_ok=True)
    with replacing(listed) as draft:
        draft.write_text(json.dumps(sorted(new)) + "\n")


def _sections(runs: Runs) -> list[Section]:
    made = dict(charts(runs))
    summary = summary_table(runs)
    quality = made["Quality"]
    no_clients = [] if any(chart.name == "clients" for chart in quality) else [NO_CLIENTS]
    held = made["Who holds what"]
    return [
        Section(summary.title, [summary]),
        Section("Quality", charts=quality, notes=no_clients),
        Section("Measured and published", _there(published_table(runs))),
        Section("Paired tests", pairs_tables(runs)),
        Section("Cost", [cost_table(runs)], made["Cost"]),
        Section("Diagnostics", _there(diagnostics_table(runs)), made["Diagnostics"]),
        Section("Who holds what", charts=held, notes=[] if held else [NO_COUNTS]),
        Section("Configurations", _there(differences_table(runs))),
        Section("Runs", [runs_table(runs)]),
        Section("Left out", _there(left_out_table(runs))),
    ]


def _there(table: Table | None) -> list[Table]:
    return [] if table is None else [table]
