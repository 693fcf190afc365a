"""``fedpeft compare`` and ``fedpeft study``."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedpeft.commands.shared import flag, going_on, listed, numbers, option, whole_number
from fedpeft.config.compose import composed
from fedpeft.config.load import load_config, settings
from fedpeft.config.overrides import key_of
from fedpeft.reporting.inputs import Input
from fedpeft.reporting.pages import Results, save_comparison, save_study
from fedpeft.reporting.progress import Display, Tally
from fedpeft.reporting.results import Measures, edges
from fedpeft.reporting.study import Done, Study
from fedpeft.reporting.study_plan import Finished, StudyPlan
from fedpeft.reporting.tables import counted
from fedpeft.simulation import ahead, launch

METHODS = "lora,ffa_lora,fedsa_lora,scl,fedtt,fedtt_plus"  # if the command names none


def compare(arguments: list[str]) -> None:
    """Run several methods on the same clients, rows and budget: a study of one run a method.

    Raises:
        RuntimeError: a run failed for another reason than training that diverged, which the saved
            table names; or no run came to its end, and then there is no table.
    """
    as_json, arguments = flag(arguments, "--json")
    methods, rest = option(arguments, "--methods")
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
    command = Command(["compare", *arguments], folder, as_json, save_comparison)
    _, results = command.finish(planned)
    if as_json:
        _print_json(folder, results)
    else:
        results.page.show()
        print(f"saved {folder}/comparison.md, comparison.csv, comparison.png")
    if chosen.questions:
        ended = {row["method"] for row in results.rows}
        paths = {run.entry: run.path for run in planned.runs() if run.entry in ended}
        _ask(paths, chosen.questions, folder, as_json)
    command.check(results.failed)


def _ask(runs: dict[str, Path], count: int, folder: Path, as_json: bool) -> None:
    """Let the runs' models answer test rows; write ``questions.md`` and show it."""
    from fedpeft.export.answers import asked  # imports torch

    text = "\n\n".join(question.text() for question in asked(runs, count))
    (folder / "questions.md").write_text(text + "\n")
    if not as_json:
        print(f"\n{text}\n\nsaved {folder}/questions.md")


def study(arguments: list[str]) -> None:
    """Run methods x learning rates x seeds; the same command goes on where it stopped.

    Raises:
        RuntimeError: a run failed for another reason than training that diverged, or no run of a
            table came to its end; all other runs are saved.
    """
    as_json, words = flag(arguments, "--json")
    only_estimate, rest = flag(words, "--estimate")
    options: dict[str, str] = {}
    for name in ("--methods", "--lrs", "--seeds", "--extend", "--data"):
        options[name], rest = option(rest, name)
    folder, base = _folder_and_base(rest, "runs/study")
    plan = plan_of(folder, base, options, METHODS)
    if only_estimate or (plan.settings.estimate and not as_json):
        from fedpeft.simulation.estimate import show_estimate  # imports torch

        show_estimate(plan.studies(), plan.settings.flops)
    if only_estimate:
        return
    command = Command(["study", *words], folder, as_json, save_study, plan.settings.extend)
    failed: dict[Path, str] = {}
    failures: dict[Path, int] = {}

    def finish_one(last: bool, planned: Study) -> Finished:
        try:
            ended, results = command.finish(planned)
        except RuntimeError as error:
            failed[planned.folder] = str(error)
            return Finished(planned, {})
        failed.pop(planned.folder, None)
        failures[planned.folder] = results.failed
        if not as_json:
            results.page.show()
            print(f"saved {planned.folder}/study.md, study.png, runs.csv")
        elif last:
            _print_json(planned.folder, results)
        ranked = {row["method"]: row["ranked_lrs"] for row in results.rows}
        return Finished(ended, {entry: lrs for entry, lrs in ranked.items() if lrs})

    plan.check_data()
    command.check_ahead(plan)
    plan.finish_tables(finish_one)
    if failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    command.check(sum(failures.values()))


def plan_of(
    folder: Path, base: Sequence[str], options: Mapping[str, str], methods: str
) -> StudyPlan:
    """Return the tables that a command asks for.

    Args:
        folder: holds the runs.
        base: overrides of every run.
        options: values of ``--methods``, ``--lrs``, ``--seeds``, ``--extend`` and ``--data``, each
            of which comes before the configuration unless it is empty.
        methods: entries by commas, if neither names any.

    Raises:
        ValueError: an option's value is not of its kind.
    """
    chosen = settings(base).study
    changes = {
        "methods": listed(options["--methods"]) if options["--methods"] else chosen.methods,
        "lrs": numbers("--lrs", options["--lrs"], float) or chosen.lrs,
        "seeds": numbers("--seeds", options["--seeds"], int) or chosen.seeds,
    }
    if (extend := whole_number("--extend", options["--extend"])) is not None:
        changes["extend"] = extend
    changes["methods"] = changes["methods"] or listed(methods)
    data = Path(options["--data"]) if options["--data"] else None
    return StudyPlan(folder, [*chosen.common, *base], replace(chosen, **changes), data)


class Command(NamedTuple):
    """A command that finishes studies.

    Attributes:
        words: the command's words after ``fedpeft``, without ``--json``; the tables name them.
        folder: holds all of its runs; the command that goes on names it.
        as_json: only the result goes to standard output.
        save: writes a study's results.
        extend: learning rates that an entry gets at most, one at a time, where its best is an edge.
    """

    words: Sequence[str]
    folder: Path
    as_json: bool
    save: Callable[[Study, Sequence[Done], Measures, str], Results]
    extend: int = 0

    def finish(self, study: Study) -> tuple[Study, Results]:
        """Finish a study and save its results.

        Returns:
            The study, with the learning rates that were added, and its results.

        Raises:
            KeyboardInterrupt: somebody stopped the study; the message says how to go on.
        """
        done = self._run_left(study)
        task = load_config(done[0].run.overrides).data
        measures = Measures(task.headline, *task.selects, quality_sign=task.sign(task.headline))
        while at_edge := {
            entry: lr
            for entry, lr in edges(done, measures).items()
            if len(study.more.get(entry, ())) < self.extend
        }:
            study = study.widened(at_edge)
            done = self._run_left(study)
        return study, self.save(study, done, measures, shlex.join(["fedpeft", *self.words]))

    def check_ahead(self, plan: StudyPlan) -> None:
        """Check what has not begun yet in all tables, before a run of the first one takes hours.

        Raises:
            ValueError: a configuration, a row, a partition or a method is wrong, or a table holds
                runs of another configuration.
            KeyboardInterrupt: somebody stopped the study; the message says how to go on.
        """
        try:
            plan.check_begun()
            if runs := plan.untried():
                ahead.check_all(runs)
        except KeyboardInterrupt as stopped:
            again = going_on(self.words, self.folder, self.as_json)
            raise type(stopped)(f"stopped before the first run, this goes on: {again}") from None

    def check(self, failed: int) -> None:
        """Give the command status 2 if runs failed for another reason than diverged training.

        Raises:
            RuntimeError: some runs failed so.
        """
        if failed:
            again = going_on(self.words, self.folder, self.as_json)
            raise RuntimeError(
                f"{counted(failed, 'run')} failed, for the reasons in the tables of {self.folder}; "
                f"what did not come to its end is tried again by: {again}"
            )

    def _run_left(self, study: Study) -> list[Done]:
        """Run a study's runs that are not there yet, and return all."""
        tally = Tally(study.size)

        def run_all(
            runs: list[list[str]], inputs: Mapping[str, Input]
        ) -> list[dict[str, Any] | Exception]:
            tally.skipped = study.size - len(runs)
            ahead.check_inputs(runs, inputs)
            return launch.run_all(runs, lambda: Display.beside_json(self.as_json), tally)

        try:
            return study.finish(run_all)
        except KeyboardInterrupt as stopped:
            text = tally.stopped(going_on(self.words, self.folder, self.as_json))
            raise type(stopped)(text) from None


def _folder_and_base(arguments: list[str], default: str) -> tuple[Path, list[str]]:
    """Return a study's folder, and the overrides that all of its runs have.

    Raises:
        ValueError: the overrides set ``method``.
    """
    for argument in arguments:
        if key_of(argument) == "method":
            name = argument.partition("=")[2]
            raise ValueError(f"the methods are given by --methods {name}, got {argument}")
    folder = Path(composed(arguments).run_dir or default)
    base = [a for a in arguments if not a.startswith("run_dir=")]
    return folder, [*base, "evaluation.clients=always"]


def _print_json(folder: Path, results: Results) -> None:
    table = {"rows": results.rows, "baseline": results.baseline, "folder": str(folder)}
    print(json.dumps(table))
