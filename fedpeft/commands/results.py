"""``fedpeft results``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft.reporting.conditions import check_known
from fedpeft.reporting.listing import (
    SD,
    Listing,
    check_export,
    export,
    narrow_page,
    ordered,
    page,
)
from fedpeft.reporting.tables import Rows, room


def results(arguments: Sequence[str]) -> None:
    """List, filter, compare and export runs.

    Raises:
        ValueError: a folder holds no run, or an option names what no run has.
    """
    args = _parser().parse_args(list(arguments))
    if args.to:
        check_export(args.to)
    if args.rounds and (args.over_seeds or not args.to):
        raise ValueError("--rounds writes each run's rounds: it goes with --to FILE alone")
    listing = Listing.of(args.folders, args.where)
    rows = listing.over_seeds() if args.over_seeds else listing.whole
    known = list(dict.fromkeys(key for row in rows for key in row))
    columns = _columns(listing, args, known)
    for name in [*columns, *([args.sort] if args.sort else [])]:
        if name not in known and name in listing.known:
            raise ValueError(f"{name} differs between the runs that --over-seeds makes one row of")
        check_known(name, known)
    if args.sort:
        rows = ordered(rows, args.sort, args.reverse)
    if args.to:
        written = listing.rounds() if args.rounds else rows
        if not written:
            raise ValueError("no run has ended a round yet, so --rounds has nothing to write")
        export(written, args.to)
    if args.json:
        print(_json(rows, columns))
    elif args.columns:
        page(rows, columns, listing.notes).show()
    else:
        narrow_page(rows, columns, listing.notes, room()).show()
    if args.to:
        print(f"saved {args.to}", file=sys.stderr if args.json else sys.stdout)


def _columns(listing: Listing, args: argparse.Namespace, known: Sequence[str]) -> list[str]:
    if args.columns:
        return args.columns.split(",")
    if not args.over_seeds:
        return listing.shown
    out = {"path", "status", "seed"}
    return [*(c for c in listing.shown if c not in out and c in known), "seeds"]


def _json(rows: Rows, columns: Sequence[str]) -> str:
    names = [name for column in columns for name in (column, f"{column}{SD}")]
    return json.dumps([{name: row[name] for name in names if name in row} for row in rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedpeft results",
        description="List and compare the runs below folders. A column is one of those shown, a "
        "setting by its dotted key (method.rank), a group's choice (method, data, strategy) or a "
        "measure of the last round (client_test_accuracy).",
    )
    options: dict[str, dict[str, Any]] = {
        "--columns": {"metavar": "A,B", "help": "show these, in this order, with whole values"},
        "--sort": {"metavar": "COLUMN", "help": "from the least; without it, by path"},
        "--to": {
            "type": Path,
            "metavar": "FILE",
            "help": ".parquet or .csv: one row a run, with all settings and measures",
        },
    }
    flags = {
        "--over-seeds": "one row for the runs that differ in the seed alone: mean ± sample "
        "deviation",
        "--reverse": "from the greatest",
        "--rounds": "with --to: one row a run, round and measure, for curves",
        "--json": "print the rows as JSON",
    }
    folders = {"nargs": "*", "type": Path, "default": [Path("runs")], "metavar": "DIR"}
    parser.add_argument("folders", **folders, help="of runs, studies or sweeps (runs)")
    where = {"nargs": "+", "action": "extend", "default": [], "metavar": "CONDITION"}
    parser.add_argument("--where", **where, help="all hold: method=lora 'lr<0.01' data!=sst2")
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    for name, text in flags.items():
        parser.add_argument(name, action="store_true", help=text)
    return parser
