"""Pages of studies, which ``fedpeft study`` and ``fedpeft compare`` write and print."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from fedpeft.reporting.figures import plot_comparison, plot_study
from fedpeft.reporting.results import (
    OWN_TEST,
    SERVER_TEST,
    Measures,
    baseline,
    comparison_row,
    run_rows,
    study_row,
)
from fedpeft.reporting.run_files import CONFIG, read_metrics
from fedpeft.reporting.saved_runs import diverged
from fedpeft.reporting.study import Done, Study
from fedpeft.reporting.tables import (
    COMPARISON,
    STUDY,
    Page,
    Rows,
    comparison_cells,
    counted,
    measures_page,
    study_cells,
    write_csv,
)


class Results(NamedTuple):
    """A study's table.

    Attributes:
        page: the table as text.
        rows: the same with all digits, the best quality first.
        baseline: quality of a client's commonest label, or null.
        failed: number of runs that failed, without those whose training diverged.
    """

    page: Page
    rows: Rows
    baseline: float | None
    failed: int


def save_study(study: Study, done: Sequence[Done], measures: Measures, command: str) -> Results:
    """Write ``runs.csv``, ``study.md`` and ``study.png`` into the study's folder.

    Args:
        study: the study.
        done: the study's runs.
        measures: names of the measures.
        command: the command line, for the notes.

    Returns:
        The table, a row a method.

    Raises:
        RuntimeError: no run came to its end.
    """
    runs = run_rows(done, measures)
    rows = [study_row([r for r in runs if r["method"] == e], measures.sign) for e in study.entries]
    best = {row["method"]: row["lr"] for row in rows}
    for run in runs:
        run["chosen"] = run["failed"] is None and run["lr"] == best[run["method"]]
    study.folder.mkdir(parents=True, exist_ok=True)
    write_csv(study.folder / "runs.csv", runs)
    failed, floor = _failures(runs), baseline(done)
    rows.sort(key=lambda row: _rank(row["quality"], measures))
    notes = [
        *study_notes(measures, study.searches, study.rates_from, study.raced),
        *_edge_notes(rows),
        *_start_notes(done, measures),
    ]
    notes += [*_floor_notes(floor), *failed, *_other_runs(study, done), f"Made by: {command}"]
    title = f"{measures.quality} after the last round, mean by rows"
    page = Page(title, STUDY, study_cells(rows), notes, below=_further_measures(rows, measures))
    page.save(study.folder / "study.md")
    shown = [row for row in rows if row["quality"] is not None]
    plot_study(study.folder / "study.png", shown, measures.quality, floor)
    return Results(page, rows, floor, _number_failed(runs))


def _other_runs(study: Study, done: Sequence[Done]) -> list[str]:
    """Say how many runs of the folder the table leaves out."""
    named = {run.path / CONFIG for run, _ in done}
    others = [file for file in study.folder.glob(f"*/lr=*/seed=*/{CONFIG}") if file not in named]
    if not others:
        return []
    return [f"Not in this table: {counted(len(others), 'run')} in {study.folder}."]


def save_comparison(
    study: Study, done: Sequence[Done], measures: Measures, command: str
) -> Results:
    """Write ``comparison.md``, ``.csv`` and ``.png`` of a study with one run a method.

    Args:
        study: the study.
        done: the study's runs.
        measures: names of the measures.
        command: the command line, for the notes.

    Returns:
        The table, a row a method whose run came to its end.

    Raises:
        RuntimeError: no run came to its end.
    """
    runs = run_rows(done, measures)
    failed, floor = _failures(runs), baseline(done)
    ended = [(r, s) for r, s in done if isinstance(s, dict) and not measures.missing(s, False)]
    curves = {run.entry: read_metrics(run.path) for run, _ in ended}
    asked = {
        entry: sum(len(line.get("cohort", ())) for line in lines) for entry, lines in curves.items()
    }
    rows = [comparison_row(r.entry, s, measures, asked[r.entry]) for r, s in ended]
    rows.sort(key=lambda row: _rank(row["quality"], measures))
    notes = [comparison_note(measures), *_floor_notes(floor), *failed, f"Made by: {command}"]
    title = f"{measures.quality} after the last round, mean by rows"
    page = Page(title, COMPARISON, comparison_cells(rows), notes)
    page.save(study.folder / "comparison.md")
    write_csv(study.folder / "comparison.csv", rows)
    picture = study.folder / "comparison.png"
    plot_comparison(picture, rows, curves, measures.quality, measures.selects, floor)
    return Results(page, rows, floor, _number_failed(runs))


def _further_measures(rows: Rows, measures: Measures) -> list[Page]:
    """Return tables of the further measures on test rows: the clients' own, and the data's."""
    pages: list[Page] = []
    for prefix, title, before in (
        (
            OWN_TEST,
            "Clients' own rows, more measures",
            {"validation": f"validation {measures.selects}"},
        ),
        (SERVER_TEST, "The data's test rows, more measures of the server's model", {}),
    ):
        names = sorted({n for row in rows for n in row["measures"] if n.startswith(prefix)})
        columns = before | {name: name.removeprefix(prefix) for name in names}
        if names:
            pages.append(measures_page(title, rows, columns))
    return pages


def _rank(quality: float | None, measures: Measures) -> float:
    """Return a number by which the best quality comes first, and none last."""
    return math.inf if quality is None else -measures.quality_sign * quality


def comparison_note(measures: Measures) -> str:
    """Return the sentence that explains the columns of a comparison."""
    return (
        f"quality: {measures.quality} on the clients' own test rows after the last round, mean "
        "weighted by rows (comparison.csv has the unweighted one too); best: the same at the round "
        "that validation chose; global test: the server's model on the test set (none where the "
        "head is personal); kB per client."
    )


def study_notes(
    measures: Measures, searched: bool, rates_from: str | None = None, raced: bool = False
) -> list[str]:
    """Return the sentences that explain the columns of a study.

    Args:
        measures: names of the measures.
        searched: true if an entry of this table has more than one learning rate.
        rates_from: name of the table that searched the rates; null if it was this table or none.
        raced: true if seeds after the first are run with the best rates of the first alone.
    """
    lr = "lr: each method has one; none was searched."
    if searched or rates_from:
        where = f", in the table {rates_from}" if rates_from else ""
        lr = (
            f"lr: the one with the best {measures.selects} on the clients' own validation rows "
            f"after the last round, mean weighted by rows, mean of all seeds{where}."
        )
    race = (
        " Seeds after the first were run with each method's best rates of the first alone, and "
        "with rates that were added later."
    )
    return [
        f"quality: {measures.quality} on the clients' own test rows after the last round, mean "
        "weighted by rows (runs.csv has the unweighted one too); of the seeds the mean ± the "
        "sample standard deviation.",
        "global test: the same of the server's model on the data's test rows; none if a part of "
        "the model stays on the clients.",
        lr + (race if raced else ""),
        "MB: 10^6 bytes of the training's messages, all clients, both ways, mean of the seeds.",
    ]


def _edge_notes(rows: Rows) -> list[str]:
    """Return a warning that names the methods whose learning rate is an end of their grid."""
    named = [f"{row['method']} ({row['lr']:g})" for row in rows if row["edge"]]
    if not named:
        return []
    return [
        f"WARNING: the best learning rate is the grid's first or last, (edge), for "
        f"{', '.join(named)}: a better one may lie beyond, so their quality may be too low. "
        "Give more --lrs, or --extend N to add up to N on that side."
    ]


def _start_notes(done: Sequence[Done], measures: Measures) -> list[str]:
    """Return the quality of each method's model before training, if it was measured."""
    starts: dict[str, dict[int, float]] = {}  # quality before training, by entry and seed
    for run, outcome in done:
        if not isinstance(outcome, dict) or not outcome["final"]["round"]:
            continue  # an entry that does not train has its row in the table
        value = outcome["initial"].get(f"{OWN_TEST}{measures.quality}")
        if isinstance(value, float):
            starts.setdefault(run.entry, {})[run.seed] = value
    if not starts:
        return []
    named = ", ".join(f"{entry} {mean(by.values()):.3f}" for entry, by in starts.items())
    return [f"Untrained, after round 0: {named}."]


def _floor_notes(floor: float | None) -> list[str]:
    if floor is None:
        return []
    return [f"Always answering a client's commonest label scores {floor:.3f}."]


def _number_failed(rows: Rows) -> int:
    return sum(row["failed"] is not None and not diverged(row["failed"]) for row in rows)


def _failures(rows: Rows) -> list[str]:
    """Return a sentence for each run that failed; RuntimeError if all did."""
    failures = [
        f"Failed: {row['method']}, lr {row['lr']:g}, seed {row['seed']}: {row['failed']}"
        for row in rows
        if row["failed"] is not None
    ]
    if len(failures) == len(rows):
        raise RuntimeError(f"no run came to its end. {failures[0]}")
    return failures
