"""The comparison's page: a table a data set, how they were made, and what to beware of."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from comparison_rows import BASELINE, REFERENCE, SHARE, Line, Result, Row, rows, threshold
from comparison_run import DATA_SETS, GRID, SEEDS, job_of

from fedpeft.config.schema import Config
from fedpeft.reporting.tables import span

TITLES = {"sst2": "SST-2: accuracy", "mrpc": "MRPC: F1"}
HEADER = (
    "method",
    "lr",
    "quality",
    "global test",
    "trained",
    "MB in all",
    f"MB to {SHARE * 100:g} % of LoRA",
)


def write_page(path: Path, result: Result, config: Config, missing: Sequence[str]) -> None:
    """Saves it.

    Args:
        config: of any of the runs.
        missing: methods some of whose runs are not there.
    """
    parts = ["# Every method under one budget"]
    for data in DATA_SETS:
        found = rows(result, data)
        parts += [f"## {TITLES[data]}", table(HEADER, [cells(result, row) for row in found])]
        parts += goal_notes(result, data, found)
    parts += ["![Quality against megabytes](comparison.png)", "## How to read it"]
    parts += ["\n".join(f"- {note}" for note in notes(result, config, missing))]
    parts += ["## Learning rates", lr_table(result)]
    if failed := [
        f"- {job_of(line)}: {line['failed']}" for line in result.found if "failed" in line
    ]:
        parts += ["## Diverged", "\n".join(failed)]
    path.write_text("\n\n".join(parts) + "\n")


def table(header: Sequence[str], found: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(result: Result, row: Row) -> list[str]:
    """A row as text, in the order of ``HEADER``."""
    to_goal = f"{megabytes(row.bytes_to_goal)} ({row.reached}/{row.runs})"
    return [
        result.label(row.method),
        "-" if row.lr is None else f"{row.lr:g}{result.edge(row.method)}",
        quality_cell(row),
        "-" if row.global_test is None else f"{row.global_test:.3f}",
        "-" if row.trained is None else span(row.trained),
        megabytes(row.bytes),
        to_goal if row.reached else "-",
    ]


def megabytes(size: float | None) -> str:
    """Of 10^6 bytes."""
    return "-" if size is None else f"{size / 1e6:,.1f}"


def quality_cell(row: Row) -> str:
    """``0.841 ± 0.012``, and of how many runs if some diverged."""
    if row.quality is None:
        return "diverged"
    deviation = "" if row.quality_sd is None else f" ± {row.quality_sd:.3f}"
    some = f" ({row.runs - row.diverged} of {row.runs})" if row.diverged else ""
    return f"{row.quality:.3f}{deviation}{some}"


def goal_notes(result: Result, data: str, found: Sequence[Row]) -> list[str]:
    """What the last column's goal is, and whether it says anything."""
    goal = threshold(result, data)
    if goal is None:
        return [f"{REFERENCE} is not there: no bytes to its quality."]
    text = f"{SHARE * 100:g} % of LoRA's quality is {goal:.3f}."
    floor = next(row.quality for row in found if row.method == BASELINE)
    if floor is not None and floor >= goal:
        text += (
            f" **The commonest label alone has {floor:.3f}, which is no less: on this data set the "
            "last column says nothing of what was learnt.**"
        )
    return [text]


def notes(result: Result, config: Config, missing: Sequence[str]) -> list[str]:
    """How the runs were made, and what the columns are."""
    cohort = config.clients_per_round or config.num_clients
    first = TITLES[DATA_SETS[0]].partition(":")[0]
    most = config.evaluation.max_client_rows
    some = "" if most is None else f", at most {most} of each client's"
    found = [
        f"Made by `python scripts/comparison.py DATA`, where DATA holds {' and '.join(DATA_SETS)}. "
        "All runs are in runs.jsonl, one's configuration in config.yaml, all digits in "
        "comparison.csv.",
        f"Budget, the same for all: {config.num_clients} clients, Dirichlet alpha "
        f"{config.partition.alpha:g}, {cohort} of them a round, {config.num_rounds} rounds of "
        f"{config.local_steps} steps of {config.batch_size} rows each.",
        f"lr: of {len(GRID)}, the one with the best measure on the clients' validation rows of "
        f"{first} after the last round of seed {SEEDS[0]}, the smaller of equals; it holds for all "
        "seeds and both data sets. (edge): the grid ends there, beyond it may be a better one.",
        f"quality: on the clients' own test rows after the last round{some}, mean by rows; then "
        f"mean ± sample standard deviation over {len(SEEDS)} seeds, each with its own partition, "
        "cohorts and initial values.",
        "global test: the server's model on the whole test set, mean over the seeds; none where "
        "some parameters stay with the clients.",
        f"{BASELINE}: every client always answers the commonest label of its own training rows; on "
        "the test set, that of all of them.",
        "MB: 10^6 bytes of the training's messages, all clients, both ways; what evaluation sends "
        "is not in it.",
        f"{HEADER[-1]}: sent until the first evaluation, each {config.evaluation.every} rounds, "
        "with that share of LoRA's mean quality on the clients' test rows; the median over the "
        "seeds that reach it, and how many do. This reads test rows to report, not to choose.",
        "local_only and centralized are LoRA's two ends: each client alone, and all rows in one "
        f"place, where one model takes the steps of {cohort} clients in a round. Bytes would mean "
        "nothing.",
        *machine_notes(result.found),
    ]
    if left := [str(job_of(line)) for line in result.found if line.get("refused")]:
        found.append("Went on without clients whose training diverged: " + ", ".join(left) + ".")
    if missing:
        found.append("Not shown, as not all of their runs are there: " + ", ".join(missing) + ".")
    return found


def machine_notes(found: Sequence[Line]) -> list[str]:
    """Where the runs were made, and with which versions."""
    devices = Counter(line["device"] for line in found)
    versions = Counter(json.dumps(line["versions"]) for line in found if "versions" in line)
    return [
        "Runs by device: " + ", ".join(f"{name}: {n}" for name, n in devices.most_common()) + ".",
        *(
            f"Versions of {count} runs that came to an end: "
            + ", ".join(f"{name} {version}" for name, version in json.loads(which).items())
            + "."
            for which, count in versions.most_common()
        ),
    ]


def lr_table(result: Result) -> str:
    """Validation by learning rate, the methods in alphabetical order."""
    header = ["method", *(f"{lr:g}" for lr in GRID), "chosen"]
    return table(header, [lr_cells(result, method) for method in sorted(result.chosen)])


def lr_cells(result: Result, method: str) -> list[str]:
    """One method's, its chosen one bold."""
    key, chosen = (method, DATA_SETS[0], SEEDS[0]), result.chosen[method]
    by_lr = {
        line["lr"]: "diverged" if "failed" in line else f"{line['validation']:.3f}"
        for line in result.found
        if (line["method"], line["data"], line["seed"]) == key
    }
    found = [f"**{by_lr[lr]}**" if lr == chosen else by_lr[lr] for lr in GRID]
    last = "-" if chosen is None else f"{chosen:g}{result.edge(method)}"
    return [result.label(method), *found, last]
