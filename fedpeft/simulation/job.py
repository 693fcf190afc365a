"""A job of a sweep, which Hydra's launchers run in this process or in others.

Each job notes how it ended in a file of its own, because Hydra's sweepers return nothing.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedpeft.config.compose import composed
from fedpeft.config.overrides import quoted
from fedpeft.config.sweeps import SweepPlan
from fedpeft.errors import explained
from fedpeft.files import replacing
from fedpeft.reporting.progress import DONE, FAILED, SKIPPED, Display, Tally, summary_text
from fedpeft.reporting.saved_runs import Outcome, SavedRun, hash_of, settings_of
from fedpeft.simulation.launch import run

POLL = 0.5  # seconds between looks for jobs that ended in other processes


class JobEnded(NamedTuple):
    """A job that ended.

    Attributes:
        name: the overrides that set the job apart from the other jobs.
        kind: ``done``, ``skipped`` or ``failed``.
        path: the run's directory; empty if the job's configuration is wrong.
        reason: the error's text; empty if it has not failed.
        process: the number of the process in which it ran.
        earlier: true if the job failed in an earlier sweep and did not run again.
    """

    name: str
    kind: str
    path: str
    reason: str = ""
    process: int = 0
    earlier: bool = False


@dataclass(frozen=True)
class SweepJob:
    """The function that Hydra calls for each job.

    Args:
        plan: the sweep's plan.
        notes: the folder that takes the notes.
        started: time at which the sweep began, in seconds since 1970.
        process: the number of the process in which the sweep began.
        skipped: the number of jobs whose results were there before it.
        as_json: show what is shown on standard error.
        read: notes that this process has read, by their files' names.
    """

    plan: SweepPlan
    notes: Path
    started: float
    process: int
    skipped: int
    as_json: bool
    read: dict[str, JobEnded] = field(default_factory=dict, compare=False)

    def __call__(self, _: DictConfig) -> float | None:
        """Run a job, unless its result is there.

        Returns:
            The measure that selects the best round, after the last round; null if the run failed,
            because an error would end the sweep.
        """
        hydra = HydraConfig.get()
        overrides = [str(override) for override in hydra.overrides.task]
        name, here = self.plan.label(overrides), os.getpid() == self.process
        # Nobody could tell apart the lines of runs in several processes, so they show none.
        shown = Display.beside_json(self.as_json, quiet=not here)
        folder = Path(hydra.runtime.output_dir)
        ended, outcome = run_once(overrides, name, folder, self.notes, shown)
        with replacing(self.notes / f"{hydra.job.num:09}.json") as draft:
            draft.write_text(json.dumps(ended))
        if here:
            if ended.kind == DONE and isinstance(outcome, dict) and not self.as_json:
                print(summary_text(outcome))
            self.show(ended)
        return _value(outcome)

    def ended(self) -> list[JobEnded]:
        """Return the jobs that ended, by their numbers."""
        for file in self.notes.glob("*.json"):
            if file.name not in self.read:
                self.read[file.name] = JobEnded(*json.loads(file.read_text()))
        return [self.read[name] for name in sorted(self.read)]

    def tally(self) -> Tally:
        """Count the jobs that ended."""
        ended = self.ended()
        kinds = [one.kind for one in ended]
        skipped = max(self.skipped, kinds.count(SKIPPED))
        counts = kinds.count(DONE), skipped, kinds.count(FAILED)
        earlier = sum(one.earlier for one in ended)
        return Tally(self.plan.total, *counts, earlier, started=self.started)

    def show(self, ended: JobEnded) -> None:
        """Show a job that ended, and how far the sweep is."""
        out = sys.stderr if self.as_json else sys.stdout
        if ended.kind == FAILED:
            print(f"failed: {ended.name}: {ended.reason}", file=out)
        if ended.kind != SKIPPED:
            print(self.tally().text(), file=out, flush=True)


def path_of(overrides: Sequence[str], folder: Path) -> Path:
    """Return the directory of a job's run, below the sweep's folder."""
    return folder / hash_of(settings_of(composed(overrides)))


def continuing(overrides: Sequence[str], path: Path) -> list[str]:
    """Return the overrides of a run that begins, or goes on, in a directory."""
    return [*overrides, f"run_dir={quoted(path)}", "resume=true"]


def run_once(
    overrides: Sequence[str], name: str, folder: Path, notes: Path, display: Display
) -> tuple[JobEnded, Outcome]:
    """Run a job, unless its result is there, and return how it ended, now or in an earlier sweep.

    A sweeper that draws values may draw the same ones for several jobs at once. The first of them
    runs, and the others wait for its result.

    Args:
        overrides: the job's configuration.
        name: sets it apart from the other jobs.
        folder: the sweep's, which holds the runs' directories.
        notes: folder of the sweep's notes, for the lock.
        display: shows the run.
    """
    path, earlier = "", False
    try:
        saved = SavedRun(path_of(overrides, folder))
        path = str(saved.path)
        with FileLock(notes / f"{saved.path.name}.lock"):
            if isinstance(outcome := saved.outcome(), dict):
                return JobEnded(name, SKIPPED, path), outcome
            earlier = outcome is not None
            if outcome is None:
                display.show(name)
                outcome = _noted(saved, overrides, display)
                return JobEnded(name, DONE, path, process=os.getpid()), outcome
    except Exception as error:  # a job's error must leave the other jobs alone
        outcome = RuntimeError(explained(error))
    return JobEnded(name, FAILED, path, str(outcome), os.getpid(), earlier), outcome


def _noted(saved: SavedRun, overrides: Sequence[str], display: Display) -> dict[str, Any]:
    """Run a configuration; if training diverges, the directory says so."""
    try:
        return run(continuing(overrides, saved.path), display)
    except Exception as error:
        saved.note(error)
        raise


def _value(outcome: Outcome) -> float | None:
    if isinstance(outcome, Exception):
        return None
    value = outcome["final"].get(outcome["selected_by"])
    return None if value is None else float(value)


@contextmanager
def watched(job: SweepJob) -> Iterator[None]:
    """Show the jobs that end in other processes, whose own output may go to a file."""
    over = Event()
    thread = Thread(target=_watch, args=(job, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(job: SweepJob, over: Event) -> None:
    shown: set[JobEnded] = set()
    last = False
    while not last:
        last = over.wait(POLL)
        for ended in job.ended():
            if ended.process != job.process and ended not in shown:
                job.show(ended)
                shown.add(ended)
