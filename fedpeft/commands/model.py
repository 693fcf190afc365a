"""``fedpeft export``, ``predict`` and ``evaluate``."""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from fedpeft.config.overrides import key_of
from fedpeft.data.rows.source import prefix_of
from fedpeft.data.tasks.base import Task
from fedpeft.engine.cpu import cores
from fedpeft.engine.evaluate import scored
from fedpeft.export.answers import answers
from fedpeft.export.folder import FORMS, is_exported, read
from fedpeft.export.load import Opened, opened
from fedpeft.export.run import open_run
from fedpeft.export.write import HOW
from fedpeft.export.write import export as write
from fedpeft.reporting.saved_runs import SavedRun

AT_ONCE = 64  # lines that are answered together


def export(arguments: Sequence[str]) -> None:
    """Write the model of a finished run into a folder that other programs load."""
    parser = _parser("export", "directory of a finished run", export.__doc__)
    add = parser.add_argument
    add("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--merge", action="store_true", help="fold the change into the weights: --as transformers")
    add("--as", dest="form", choices=FORMS, help="form; by default the first that the method has")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(arguments)
    if args.merge and args.form not in (None, "transformers"):
        raise ValueError(f"--merge is --as transformers, got --as {args.form} too")
    run = open_run(args.path, args.overrides, args.best, args.client, states=args.state_folder)
    written = write(run, args.to, "transformers" if args.merge else args.form)
    if args.json:
        print(json.dumps(written._asdict() | {"folder": str(written.folder)}))
        return
    print(f"{written.folder} holds the form {written.form}: {HOW[written.form]}")
    print(f"loaded again, its logits are the run's within {written.difference:.1e}")


def predict(arguments: Sequence[str]) -> None:
    """Answer the lines of standard input, one JSON object a line; null for an empty line."""
    parser = _parser(
        "predict", "directory of a finished run, or an exported folder", predict.__doc__
    )
    args = parser.parse_intermixed_args(arguments)
    if lines := [word for word in args.overrides if "=" not in word and not word.startswith("~")]:
        line = f"echo '{lines[0]}' | fedpeft predict RUN"
        raise ValueError(f"questions come on standard input, one a line: {line}")
    model = _open(args)
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 are found line by line
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    lines = (line.rstrip("\n") for line in sys.stdin)
    for number, part in enumerate(_parts(lines)):
        for answer in answers(model, part, 1 + number * AT_ONCE):
            print(json.dumps(answer, ensure_ascii=False), flush=True)


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a model on its task's test rows; on all rows of a new set without a test split."""
    parser = _parser(
        "evaluate", "directory of a finished run, or an exported folder", evaluate.__doc__
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(arguments)
    model = _open(args)
    keys = {*map(key_of, args.overrides)}
    if keys & {"data", "data.path"} and "data.test_split" not in keys:
        most = model.config.data.max_test_rows if "data.max_test_rows" in keys else None
        task, note = _tested(model.config.data, _rows_of(args.path), most)
        if note:
            print(f"note: {note}", file=sys.stderr)
        model = model._replace(config=replace(model.config, data=task))
    elif not any(key.startswith("data.") for key in keys):
        _check_rows(model.config.data, args.path)
    task = model.config.data
    for split in task.test_splits:
        for note in task.notes_on(split):
            print(f"note: {note}", file=sys.stderr)
    measures = measured(model)
    if args.json:
        print(json.dumps(measures))
        return
    for name, value in measures.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _tested(task: Task, rows_of_run: str | None, most: int | None) -> tuple[Task, str]:
    """Return a task with the test rows of a new set, and a sentence on which they are.

    Args:
        task: reads the new set.
        rows_of_run: hash of the rows that the run had, see ``Source.fingerprint``; null if unknown.
        most: number of rows of a set other than the run's at most; null for all.
    """
    whole = task.all_as_test(most)
    same = rows_of_run is not None and _hash_of(task) == rows_of_run
    if whole.test_split == task.test_split:  # it has test rows
        return task if same else whole, ""
    if same:
        return task, (
            f"{task.folder()} holds the rows of the run, so only the rows that the run set aside "
            "for its test are measured"
        )
    count = "all rows" if most is None else f"at most {most} rows"
    return whole, (
        f"{task.folder()} has no split test, so {count} are measured, with any that the model was "
        "trained on"
    )


def _check_rows(task: Task, path: Path) -> None:
    """Refuse rows other than the run's where some are set aside for the test: others are now.

    Raises:
        ValueError: the rows have changed since the run.
    """
    before = _rows_of(path) if task.is_set_aside("test") else None
    if before and before != (now := task.fingerprint()["sha256"]):
        raise ValueError(
            f"the rows in {task.folder()} have changed since {path} was trained (SHA-256 "
            f"{before[:12]}, now {now[:12]}), so its test rows may be some that trained: bring "
            "back what they were, or name a set of its own by data.path=FOLDER"
        )


def _hash_of(task: Task) -> str | None:
    """Return the hash of a set's rows; null if they cannot be divided as a run divides them."""
    try:
        return task.fingerprint()["sha256"]
    except ValueError:  # such as too few rows to set some aside
        return None


def _rows_of(path: Path) -> str | None:
    """Return the hash of the rows that a run or an exported folder had; null if it has none."""
    if is_exported(path):
        return read(path).get("rows_sha256")
    summary = SavedRun(path).summary
    return None if summary is None else summary.get("data", {}).get("sha256")


def measured(model: Opened) -> dict[str, float | int]:
    """Return a model's measures on all test splits, named as a run's summary names them.

    Each split's number of rows stands beside them.
    """
    measures: dict[str, float | int] = {}
    task = model.config.data
    for split in task.test_splits:
        examples = task.encode(split, model.processor)
        values, _ = scored(*model, examples, cores(), last=True)
        prefix = prefix_of(split)
        measures |= {f"{prefix}_{name}": value for name, value in values.items()}
        measures[f"{prefix}_rows"] = len(examples.rows)
    return measures


def _parser(command: str, path: str, text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"fedpeft {command}", description=text)
    parser.add_argument("path", type=Path, metavar="RUN", help=path)
    parser.add_argument("overrides", nargs="*", help="key=value, such as data.path=FOLDER")
    parser.add_argument("--best", action="store_true", help="the best round, not the last one")
    parser.add_argument("--client", type=int, metavar="N", help="the model of client N")
    parser.add_argument(
        "--state-folder",
        type=Path,
        metavar="DIR",
        help="what clients keep, at a site its node's folder; by default clients/ of the run",
    )
    return parser


def _open(args: argparse.Namespace) -> Opened:
    """Open a run's directory or an exported folder."""
    if is_exported(args.path):
        if args.best or args.client is not None or args.state_folder is not None:
            raise ValueError(
                f"{args.path} is an exported folder, which holds one model: --best, --client and "
                "--state-folder choose one of a run"
            )
        return opened(args.path, args.overrides)
    chosen = args.best, args.client
    run = open_run(args.path, args.overrides, *chosen, whole=False, states=args.state_folder)
    return Opened(run.replica.model, run.config, run.replica.processor)


def _parts(lines: Iterator[str]) -> Iterator[list[str]]:
    while part := list(islice(lines, AT_ONCE)):
        yield part
