"""The command line: fedpeft run | compare | study | params | show | export | check | ..."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import explained
from fedpeft.simulation.stop import Terminated, stop_on_sigterm

# Each command imports what it needs, rich too, because torch takes seconds, and a wrong word or
# --help should not wait.
if TYPE_CHECKING:
    from fedpeft.reporting.progress import Display

USAGE = """usage: fedpeft COMMAND [--json] [overrides]

  run        one run, or with -m a sweep:  fedpeft run method=scl num_clients=4
                                           fedpeft run -m method=scl,fedtt partition.alpha=0.1,1
  compare    several methods under one budget: fedpeft compare [--methods scl,lora] [overrides]
  study      methods x learning rates x seeds: fedpeft study --methods scl,lora+strategy=local_only
                                           --lrs 1e-4,1e-3 --seeds 0,1,2 run_dir=FOLDER [overrides]
                                           or of a paper's table: experiment=scl_table2 scale=small
  results    runs below folders, compared: fedpeft results [DIR ...] [--where method=lora 'lr<0.01']
                                           [--over-seeds] [--sort COLUMN] [--to FILE.parquet]
  params     what a method trains and sends: fedpeft params model=roberta_base [method=fedtt]
  show       what each client got:         fedpeft show RUN [--round N]
  report     a page, figures and tables:   fedpeft report DIR... [--chosen] [--to FOLDER]
  partition  who holds what:               fedpeft partition num_clients=10 partition.alpha=0.1
  check      a dry run, which trains nothing: fedpeft check method=scl num_clients=4
  export     the model as a folder:        fedpeft export RUN --to DIR [--merge] [--client N]
  predict    answers to lines of text:     fedpeft predict RUN < texts
  evaluate   the measures on test rows:    fedpeft evaluate RUN data.path=FOLDER
  node       a site of a deployment:       fedpeft node --help
  server     the server of a deployment:   fedpeft server --help
  deploy     both on this machine:         fedpeft deploy trial method=fedsa_lora num_rounds=2

Overrides are those of Hydra: key=value, group=name. Groups and names stand in conf/.
"""
# These print the options that they parse.
OWN_HELP = ("results", "export", "predict", "evaluate", "node", "server", "deploy")
# Methods of compare and study if --methods is missing; params counts all methods.
METHODS = "lora,ffa_lora,fedsa_lora,scl,fedtt,fedtt_plus"


def main() -> None:
    """Run a command; an error ends it with one sentence and status 2, or 1 if nobody expected it.

    With FEDPEFT_TRACEBACK set, errors show their traceback.
    """
    # Turn off usage reports, and tokenizers' threads beside the workers. This comes first, because
    # libraries read these variables when they are imported.
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, *arguments = sys.argv[1:] or ["--help"]
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": run,
        "compare": compare,
        "study": study,
        "results": results,
        "params": params,
        "show": show,
        "report": report,
        "partition": partition,
        "check": check,
        "export": export,
        "predict": predict,
        "evaluate": evaluate,
        "node": node,
        "server": server,
        "deploy": deploy,
    }
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in commands:
        close = get_close_matches(command, commands, 1)
        advice = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(commands)}"
        print(f"fedpeft: unknown command {command}, {advice}", file=sys.stderr)
        sys.exit(2)
    if {"-h", "--help"} & {*arguments} and command not in OWN_HELP:
        print(usage_of(command))
        return
    stop_on_sigterm()
    try:
        commands[command](arguments)
    except KeyboardInterrupt as stopped:
        print(f"fedpeft: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(143 if isinstance(stopped, Terminated) else 130)
    except Exception as error:
        if os.environ.get("FEDPEFT_TRACEBACK"):
            raise
        print(f"fedpeft: {explained(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError | OSError | RuntimeError) else 1)


def usage_of(command: str) -> str:
    """Return the lines of USAGE on one command, and the last one, on overrides."""
    lines = USAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {command} "))
    more = takewhile(lambda line: line.startswith("    "), lines[start + 1 :])
    return "\n".join([lines[start].strip(), *more, "", lines[-1]])


def run(arguments: list[str]) -> None:
    """Run one configuration, or a sweep by Hydra's multirun."""
    as_json, arguments = _flag(arguments, "--json")
    if {"-m", "--multirun"} & set(arguments):
        _sweep(arguments, as_json)
        return
    from fedpeft.simulation import launch

    summary = launch.run(arguments, _display(as_json))
    _show(summary, as_json)


def _sweep(arguments: list[str], as_json: bool) -> None:
    """Run a sweep; a job that fails does not stop the others, and gives status 2 at the end."""
    from fedpeft.config.sweeps import plan
    from fedpeft.simulation.sweep import sweep

    planned = plan([a for a in arguments if a not in ("-m", "--multirun")])
    if not sweep(planned, _going_on(["run", *arguments], planned.folder, as_json), as_json):
        sys.exit(2)


def _display(quiet: bool) -> "Display":
    """Return a display on standard output; on standard error if JSON goes to the output."""
    from rich.console import Console

    from fedpeft.reporting.progress import Display

    return Display(Console(highlight=False, soft_wrap=True, stderr=quiet))


def _show(summary: dict[str, Any], as_json: bool) -> None:
    from fedpeft.reporting.progress import summary_text

    print(json.dumps(summary) if as_json else summary_text(summary))


def compare(arguments: list[str]) -> None:
    """Run several methods on the same clients, rows and budget: a study of one run a method."""
    from fedpeft.config.load import load_config, settings
    from fedpeft.reporting.pages import save_comparison
    from fedpeft.reporting.study import Study, listed

    as_json, arguments = _flag(arguments, "--json")
    methods, rest = _option(arguments, "--methods", "")
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, base = _folder_and_base(rest, f"runs/{stamp}_compare")
    chosen = settings(base).study
    entries = listed(methods) if methods else chosen.methods or listed(METHODS)
    planned = Study(folder, base, entries, flat=True)
    if chosen.questions and not load_config(planned.runs()[0].overrides).data.generates(last=True):
        raise ValueError(
            f"study.questions={chosen.questions} needs a task that generates text, such as "
            "data=docstrings_qa, and data.generate=last"
        )
    _, results = _finished(planned, save_comparison, ["compare", *arguments], as_json)
    if as_json:
        _print_json(folder, results)
    else:
        results.page.show()
        print(f"saved {folder}/comparison.md, comparison.csv, comparison.png")
    if chosen.questions:
        from fedpeft.export.answers import asked

        runs = {run.entry: run.path for run in planned.runs()}
        ended = {row["method"] for row in results.rows}
        questions = asked({e: path for e, path in runs.items() if e in ended}, chosen.questions)
        text = "\n\n".join(question.text() for question in questions)
        (folder / "questions.md").write_text(text + "\n")
        if not as_json:
            print(f"\n{text}\n\nsaved {folder}/questions.md")


def study(arguments: list[str]) -> None:
    """Run methods x learning rates x seeds; the same command goes on where it stopped.

    Raises:
        RuntimeError: no run of a table came to its end; the other tables are there.
    """
    from fedpeft.reporting.pages import save_study
    from fedpeft.reporting.study import Study
    from fedpeft.reporting.study_plan import Finished, StudyPlan

    as_json, rest = _flag(arguments, "--json")
    only_estimate, rest = _flag(rest, "--estimate")
    names = ("--methods", "--lrs", "--seeds", "--extend", "--data")
    options: dict[str, str] = {}
    for name in names:
        options[name], rest = _option(rest, name, "")
    folder, base = _folder_and_base(rest, "runs/study")
    plan = StudyPlan.of(folder, base, options, METHODS)
    command = ["study", *(a for a in arguments if a != "--json")]
    if only_estimate or (plan.settings.estimate and not as_json):
        from fedpeft.simulation.estimate import show_estimate

        show_estimate(plan.studies(), plan.settings.flops)
    if only_estimate:
        return
    failed: dict[Path, str] = {}

    def finish_one(last: bool, planned: Study) -> Finished:
        try:
            ended, results = _finished(planned, save_study, command, as_json, plan)
        except RuntimeError as error:
            failed[planned.folder] = str(error)
            return Finished(planned, {})
        failed.pop(planned.folder, None)
        if not as_json:
            results.page.show()
            print(f"saved {planned.folder}/study.md, study.png, runs.csv")
        elif last:
            _print_json(planned.folder, results)
        ranked = {row["method"]: row["ranked_lrs"] for row in results.rows}
        return Finished(ended, {entry: lrs for entry, lrs in ranked.items() if lrs})

    plan.finish_tables(finish_one)
    if failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _folder_and_base(arguments: list[str], default: str) -> tuple[Path, list[str]]:
    """Return a study's folder, and the overrides that all of its runs have."""
    from fedpeft.config.load import composed

    folder = Path(composed(arguments).run_dir or default)
    base = [a for a in arguments if not a.startswith("run_dir=")]
    return folder, [*base, "evaluation.clients=always"]


def _finished(
    study: Any, save: Callable[..., Any], arguments: list[str], as_json: bool, plan: Any = None
) -> tuple[Any, Any]:
    """Finish a study and save its results.

    Args:
        study: to finish.
        save: writes the results.
        arguments: of the command, for the notes and to go on.
        as_json: show nothing on the way.
        plan: of which the study is one table; null for a study alone, whose grid stays as it is.

    Returns:
        The study, with the learning rates that were added, and its results.

    Raises:
        KeyboardInterrupt: somebody stopped the study; the message says how to go on.
    """
    from fedpeft.config.load import load_config
    from fedpeft.reporting.progress import Tally
    from fedpeft.reporting.results import Measures, edges

    def finished(study: Any) -> Any:
        tally = Tally(study.size)

        def run_left(runs: list[list[str]]) -> list[dict[str, Any] | Exception]:
            from fedpeft.simulation.launch import run_all

            tally.skipped = study.size - len(runs)
            return run_all(runs, lambda: _display(as_json), tally)

        try:
            return study.finish(run_left)
        except KeyboardInterrupt as stopped:
            folder = study.folder if plan is None else plan.folder
            text = tally.stopped(_going_on(arguments, folder, as_json))
            raise type(stopped)(text) from None

    done = finished(study)
    task = load_config(done[0].run.overrides).data
    measures = Measures(task.headline, *task.selects, quality_sign=task.sign(task.headline))
    most = plan.settings.extend if plan else 0
    while at_edge := {
        entry: lr
        for entry, lr in edges(done, measures).items()
        if len(study.more.get(entry, ())) < most
    }:
        study = study.widened(at_edge)
        done = finished(study)
    return study, save(study, done, measures, shlex.join(["fedpeft", *arguments]))


def _print_json(folder: Path, results: Any) -> None:
    table = {"rows": results.rows, "baseline": results.baseline, "folder": str(folder)}
    print(json.dumps(table))


def _going_on(arguments: list[str], folder: Path | str, as_json: bool) -> str:
    """Return the command that goes on with the runs in a folder."""
    rest = [a for a in arguments if not a.startswith(("run_dir=", "hydra.sweep.dir="))]
    options = ["--json"] if as_json else []
    return shlex.join(["fedpeft", *rest, *options, f"run_dir={folder}"])


def params(arguments: list[str]) -> None:
    """Count parameters and bytes of one method, or of all that fit the model."""
    from fedpeft.reporting.tables import print_table, span, span_of_bytes

    as_json, arguments = _flag(arguments, "--json")
    one = [a for a in arguments if a.startswith("method=")]
    names = [one[0].removeprefix("method=")] if one else every_method()
    base = [a for a in arguments if not a.startswith("method=")]
    of_method = [a for a in base if a.startswith(("method.", "+method."))]
    if of_method and not one:
        raise ValueError(f"{of_method[0]} needs method=NAME, since not all methods have it")
    counts, refused = _counts(names, base)
    if as_json:
        print(json.dumps(counts))
        return
    cells = [
        [
            name,
            span(c["trained"]),
            span(c["sent_up"]),
            span(c["sent_down"]),
            span_of_bytes(c["bytes_up"]),
            span_of_bytes(c["bytes_down"]),
            f"{c['trained_percent']:.3f} %",
        ]
        for name, c in counts.items()
    ]
    total = next(iter(counts.values()))["total"]
    title = f"{' '.join(base) or 'model=minilm'}: {total:,} parameters; a round and client:"
    header = ("method", "trained", "sent up", "sent down", "MB up", "MB down", "of the whole")
    print_table(title, header, cells)
    print("MB: 10^6 bytes of the arrays, uncompressed; strategy=scaffold sends as much again.")
    for name, reason in refused.items():
        print(f"{name}: {reason}")


def every_method() -> list[str]:
    """Return the names of the files in conf/method."""
    from fedpeft.config.load import CONF

    return sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def _counts(names: list[str], base: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return counts by method, and reasons of methods that refuse the model; one must fit."""
    from fedpeft.config import load as configuration
    from fedpeft.engine.parameters import count_on_meta

    counts: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in names:
        config = configuration.load_config([*base, f"method={name}"])
        try:
            counts[name] = count_on_meta(config)
        except ValueError as error:
            refused[name] = str(error)
    if not counts:
        raise ValueError(next(iter(refused.values())))
    return counts, refused


def show(arguments: list[str]) -> None:
    """Show what each client of a run got in one round: rows, measures, bytes and seconds."""
    from fedpeft.reporting.clients import ClientTable
    from fedpeft.reporting.study import numbers

    as_json, arguments = _flag(arguments, "--json")
    number, arguments = _option(arguments, "--round", "")
    if len(arguments) != 1:
        raise ValueError("show needs the directory of one run: fedpeft show RUN [--round N]")
    round = next(iter(numbers("--round", number, int)), None)
    table = ClientTable.of(Path(arguments[0]), round)
    if as_json:
        print(table.as_json())
    else:
        table.page().show()


def results(arguments: list[str]) -> None:
    """List, filter, compare and export the runs below folders."""
    from fedpeft.reporting import commands

    commands.results(arguments)


def report(arguments: list[str]) -> None:
    """Write a page, figures and tables of saved runs; of studies, perhaps the chosen ones alone."""
    from fedpeft.reporting.report.write import write_report
    from fedpeft.reporting.saved_runs import chosen_runs

    chosen, arguments = _flag(arguments, "--chosen")
    to, arguments = _option(arguments, "--to", "")
    as_json, arguments = _flag(arguments, "--json")
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


def partition(arguments: list[str]) -> None:
    """Show each client's rows: a table, a heat map and a file of row numbers."""
    from fedpeft.config import load as configuration
    from fedpeft.reporting.partition import Holdings

    as_json, arguments = _flag(arguments, "--json")
    folder, arguments = _option(arguments, "--out", "")
    holdings = Holdings.of(configuration.load_config(arguments))
    if as_json:
        print(holdings.as_json())
    else:
        holdings.show()
    if folder or not as_json:
        out = Path(folder).absolute()
        names = holdings.save(out)
        print(f"saved {out}/{', '.join(names)}", file=sys.stderr if as_json else sys.stdout)


def check(arguments: list[str]) -> None:
    """Open model and data and print versions, hashes, counts and memory; problems give status 2."""
    from fedpeft.config import load as configuration

    as_json, arguments = _flag(arguments, "--json")
    configuration.settings(arguments)
    configuration.check_fields(arguments)

    from fedpeft.server.check import check  # takes seconds to import
    from fedpeft.simulation.grid import InProcessGrid

    grid = InProcessGrid(configuration.settings(arguments).num_clients)
    log = logging.getLogger("fedpeft.client")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the report says what is wrong, and a node's log all of it
    try:
        report = check(grid, arguments, simulated=True)
    finally:
        log.setLevel(level)
    if as_json:
        print(report.as_json())
    else:
        report.show()
    if report.problems:
        sys.exit(2)


def export(arguments: list[str]) -> None:
    """Write a finished run's model into a folder that other programs load."""
    from fedpeft.export import commands

    commands.export(arguments)


def predict(arguments: list[str]) -> None:
    """Answer lines of text with the model of a run or of an exported folder."""
    from fedpeft.export import commands

    commands.predict(arguments)


def evaluate(arguments: list[str]) -> None:
    """Measure the model of a run or of an exported folder on its test rows."""
    from fedpeft.export import commands

    commands.evaluate(arguments)


def node(arguments: list[str]) -> None:
    """Run a site's programs until the process is ended."""
    from fedpeft.deployment import node

    node.main(arguments)


def server(arguments: list[str]) -> None:
    """Run the server's programs until the process is ended."""
    from fedpeft.deployment import server

    server.main(arguments)


def deploy(arguments: list[str]) -> None:
    """Try a deployment on this machine."""
    from fedpeft.deployment import trial

    if arguments[:1] != ["trial"]:
        raise ValueError(f"deploy must be followed by trial, got {' '.join(arguments[:1])!r}")
    trial.main(arguments[1:])


def _flag(arguments: list[str], name: str) -> tuple[bool, list[str]]:
    """Tell whether a flag is set, and return the other arguments."""
    return name in arguments, [a for a in arguments if a != name]


def _option(arguments: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """Return an option's value, ``--name value`` or ``--name=value``, and the other arguments."""
    rest: list[str] = []
    value, pending = default, False
    for argument in arguments:
        if pending:
            value, pending = argument, False
        elif argument == name:
            pending = True
        elif argument.startswith(name + "="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if pending:
        raise ValueError(f"{name} needs a value")
    return value, rest
