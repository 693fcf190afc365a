"""``fedpeft show`` and ``report`` of saved runs, which ``results.py`` lists and compares."""

import json
from pathlib import Path

from fedpeft.commands.shared import flag, option, whole_number
from fedpeft.reporting.clients import ClientTable
from fedpeft.reporting.report.write import write_report
from fedpeft.reporting.saved_runs import chosen_runs


def show(arguments: list[str]) -> None:
    """Show what each client of a run got in one round: rows, measures, bytes and seconds."""
    as_json, arguments = flag(arguments, "--json")
    given, arguments = option(arguments, "--round")
    if len(arguments) != 1:
        raise ValueError("show needs the directory of one run: fedpeft show RUN [--round N]")
    round = whole_number("--round", given)
    table = ClientTable.of(Path(arguments[0]), round)
    if as_json:
        print(table.as_json())
    else:
        table.page().show()


def report(arguments: list[str]) -> None:
    """Write a page, figures and tables of saved runs; of studies, perhaps the chosen ones alone."""
    chosen, arguments = flag(arguments, "--chosen")
    to, arguments = option(arguments, "--to")
    as_json, arguments = flag(arguments, "--json")
    unknown = [argument for argument in arguments if argument.startswith("-")]
    if unknown or not arguments:
        got = f", got {unknown[0]}" if unknown else ""
        raise ValueError(
            f"report needs folders of runs: fedpeft report DIR... [--chosen] [--to FOLDER]{got}"
        )
    folders = [Path(argument) for argument in arguments]
    runs = chosen_runs(folders) if chosen else folders
    files = write_report(runs, Path(to) if to else folders[0] / "report")
    if as_json:
        print(json.dumps([str(file) for file in files]))
    else:
        print(f"saved {files[0]}, and {len(files) - 1} files of figures and tables beside it")
