"""Sweeps by Hydra: each job is a run in a directory named by the hash of its settings.

The same sweep, or one with more values, finds the runs that are there by their hash. Jobs may run
in other processes, so each notes how it ended in a file of its own.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import main
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from fedpeft.config.load import CONF, composed, key_of, load_config
from fedpeft.config.overrides import quoted
from fedpeft.config.sweeps import Plan
from fedpeft.errors import explained
from fedpeft.files import replacing
from fedpeft.reporting.progress import DONE, FAILED, SKIPPED, Display, Tally, summary_text
from fedpeft.reporting.saved_runs import Outcome, SavedRun, hash_of, settings_of
from fedpeft.simulation.launch import check_all, run

SHOWN = 10  # of the skipped runs, by name


@dataclass(frozen=True)
class Job:
    """The function that Hydra calls for each job, in this process or in another.

    Args:
        plan: of the sweep.
        notes: the folder in which each job notes how it ended.
        started: time at which the sweep began, in seconds since 1970.
        process: the number of the process in which the sweep began.
        skipped: the number of jobs whose results were there before it.
        as_json: show what is shown on standard error.
    """

    plan: Plan
    notes: Path
    started: float
    process: int
    skipped: int
    as_json: bool

    def __call__(self, _: DictConfig) -> float | None:
        """Run a job, unless its result is there.

        Returns:
            The measure that selects the best round, after the last round; null if the run failed,
            because an error would end the sweep.
        """
        hydra = HydraConfig.get()
        overrides = [str(override) for override in hydra.overrides.task]
        name = self.plan.label(overrides)
        here = os.getpid() == self.process
        # Nobody could tell apart the lines of runs in several processes, so they show none.
        shown = Console(highlight=False, soft_wrap=True, stderr=self.as_json, quiet=not here)
        kind, outcome = _outcome(overrides, name, Path(hydra.runtime.output_dir), Display(shown))
        self._note(int(hydra.job.num), name, kind, outcome)
        if kind == DONE and isinstance(outcome, dict) and not self.as_json:
            shown.print(summary_text(outcome), markup=False)
        self._show(f"failed: {name}: {outcome}" if kind == FAILED else "")
        self._show("" if kind == SKIPPED else self.tally().text())
        return _value(outcome)

    def _note(self, number: int, name: str, kind: str, outcome: Outcome) -> None:
        """Write the note of a job that ended."""
        failed = isinstance(outcome, Exception)
        note = {"name": name, "kind": kind, "reason": str(outcome) if failed else ""}
        with replacing(self.notes / f"{number:09}.json") as draft:
            draft.write_text(json.dumps(note | {"summary": None if failed else outcome}))

    def tally(self) -> Tally:
        """Count the jobs that ended."""
        kinds = [note["kind"] for note in read_notes(self.notes)]
        skipped = max(self.skipped, kinds.count(SKIPPED))
        counts = kinds.count(DONE), skipped, kinds.count(FAILED)
        return Tally(self.plan.total, *counts, started=self.started)

    def _show(self, text: str) -> None:
        if text:
            print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def path_of(overrides: Sequence[str], folder: Path) -> Path:
    """Return the directory of a job's run, below the sweep's folder."""
    return folder / hash_of(settings_of(composed(overrides)))


def _outcome(
    overrides: Sequence[str], name: str, folder: Path, display: Display
) -> tuple[str, Outcome]:
    """Return how a job ended, now or in an earlier sweep."""
    try:
        saved = SavedRun(path_of(overrides, folder))
        if (outcome := saved.outcome()) is not None:
            return (FAILED if isinstance(outcome, Exception) else SKIPPED), outcome
        display.console.print(name, markup=False)
        try:
            return DONE, run([*overrides, *_continuing(saved.path)], display)
        except Exception as error:
            saved.note(error)
            raise
    except Exception as error:  # a job's error must leave the other jobs alone
        return FAILED, RuntimeError(explained(error))


def _continuing(path: Path) -> list[str]:
    """Return the overrides of a run that begins, or goes on, in a directory."""
    return [f"run_dir={quoted(path)}", "resume=true"]


def _value(outcome: Outcome) -> float | None:
    if isinstance(outcome, Exception):
        return None
    value = outcome["final"].get(outcome["selected_by"])
    return None if value is None else float(value)


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of the jobs that ended, by their numbers."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def sweep(plan: Plan, command: str, as_json: bool) -> bool:
    """Run a sweep by Hydra's sweeper and launcher, and return true if no job failed.

    Args:
        plan: of the sweep.
        command: the command that goes on.
        as_json: print the summaries as JSON, one a line, and all else on standard error.

    Raises:
        ValueError: the configuration of a job is wrong; none has run then.
        KeyboardInterrupt: somebody stopped the sweep; the message says how to go on.
    """
    folder, console = Path(plan.folder).absolute(), Console(soft_wrap=True, stderr=as_json)
    folder.mkdir(parents=True, exist_ok=True)
    skipped = _check(plan, folder)
    if skipped:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        names = "; ".join(skipped[:SHOWN])
        console.print(f"skipped, because the results are there: {names}{more}", markup=False)
    with TemporaryDirectory(prefix=".jobs-", dir=folder, ignore_cleanup_errors=True) as notes:
        job = Job(plan, Path(notes), time.time(), os.getpid(), len(skipped), as_json)
        try:
            _by_hydra([*plan.arguments, *_of_sweeper(plan)], job)
        except KeyboardInterrupt as stopped:
            raise type(stopped)(job.tally().stopped(command)) from None
        except Exception:  # Optuna's, if no trial came to its end
            if not any(note["kind"] == FAILED for note in read_notes(job.notes)):
                raise
        ended = read_notes(job.notes)
    return _report(ended, as_json)


def _report(ended: Sequence[dict[str, Any]], as_json: bool) -> bool:
    """Name the jobs that failed, and return true if there is none."""
    for note in ended if as_json else ():
        if note["summary"] is not None:
            print(json.dumps(note["summary"]))
    failed = [note for note in ended if note["kind"] == FAILED]
    for note in failed:
        print(f"fedpeft: {note['name']} failed: {note['reason']}", file=sys.stderr)
    return not failed


def _check(plan: Plan, folder: Path) -> list[str]:
    """Check all jobs that are to run, and return the names of those whose results are there."""
    skipped, left = [], []
    for overrides in plan.jobs:
        saved = SavedRun(path_of(overrides, folder))
        if saved.outcome() is None:
            left.append([*overrides, *_continuing(saved.path)])
        elif saved.summary is not None:
            skipped.append(plan.label(overrides))
    if left:
        check_all(left)
    return skipped if plan.all_known else []


def _of_sweeper(plan: Plan) -> list[str]:
    """Return settings for a sweeper that optimises, of those that the user does not give.

    Without a seed, another call would choose other values and find no results.
    """
    wanted: dict[str, object] = {}
    if "direction" in plan.sweeper:
        sign = load_config(plan.jobs[0]).data.selects[1]
        wanted["direction"] = "maximize" if sign > 0 else "minimize"
    if "max_failure_rate" in plan.sweeper:
        wanted["max_failure_rate"] = 1.0
    if "seed" in (plan.sweeper.get("sampler") or {}):
        wanted["sampler.seed"] = 0
    given = {key_of(argument) for argument in plan.arguments}
    settings = {f"hydra.sweeper.{key}": value for key, value in wanted.items()}
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def _by_hydra(overrides: Sequence[str], job: Job) -> None:
    """Hand over to Hydra, whose launcher and sweeper the configuration may choose."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # an error arrives here, and not as a trace
    before = sys.argv
    sys.argv = ["fedpeft", "--multirun", *overrides]
    try:
        main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
