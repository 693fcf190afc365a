"""Sweeps by Hydra: each job is a run in a directory named by the hash of its settings.

The same sweep, or a sweep with more values, finds the runs that are there by their hash.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from hydra import main

from fedpeft.config.compose import CONF
from fedpeft.config.load import load_config
from fedpeft.config.overrides import key_of
from fedpeft.config.sweeps import SweepPlan
from fedpeft.reporting.progress import FAILED, SKIPPED, Display, Tally
from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.simulation.ahead import check_all
from fedpeft.simulation.job import JobEnded, SweepJob, continuing, path_of, watched

SHOWN = 10  # number of skipped runs that are shown by name
NOTES, LOCK = ".jobs-", ".lock"  # begin the name of a folder for notes; the file that is locked
NO_TRIAL = "No trials are completed yet."  # Optuna's sentence


def sweep(plan: SweepPlan, command: str, as_json: bool) -> bool:
    """Run a sweep by Hydra's sweeper and launcher, and return true if no job failed.

    Args:
        plan: the sweep's plan.
        command: the command that resumes the sweep, for the message of a stop.
        as_json: print the summaries as JSON, one a line, and all else on standard error.

    Raises:
        ValueError: the configuration of a job is wrong; none has run then.
        KeyboardInterrupt: somebody stopped the sweep; the message says how to go on.
    """
    folder, shown = Path(plan.folder).absolute(), Display.beside_json(as_json)
    _check_apart(plan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    there, left = _there(plan, folder)
    if left:
        check_all(left)
    skipped = [one.name for one in there if one.kind == SKIPPED]
    if skipped and plan.all_known:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        names = "; ".join(skipped[:SHOWN])
        shown.show(f"skipped, because the results are there: {names}{more}")
    if left or not plan.all_known:
        there = _run(plan, folder, len(skipped) if plan.all_known else 0, command, as_json)
    else:
        failed = len(there) - len(skipped)
        shown.show(Tally(len(there), 0, len(skipped), failed).text())
    return _report(there, as_json)


def _check_apart(plan: SweepPlan, folder: Path) -> None:
    """Check that no two jobs are the same run.

    Raises:
        ValueError: two jobs are the same run, because they differ in nothing that changes a result.
    """
    first: dict[Path, list[str]] = {}
    for overrides in plan.jobs:
        same = first.setdefault(path_of(overrides, folder), overrides)
        if same is not overrides:
            raise ValueError(
                f"two jobs of the sweep are the same run: {plan.label(same)} and "
                f"{plan.label(overrides)} differ in nothing that changes its result"
            )


def _there(plan: SweepPlan, folder: Path) -> tuple[list[JobEnded], list[list[str]]]:
    """Return the jobs that ended in an earlier sweep, and the overrides of those that did not."""
    there, left = [], []
    for overrides in plan.jobs:
        saved = SavedRun(path_of(overrides, folder))
        outcome, name, path = saved.outcome(), plan.label(overrides), str(saved.path)
        if outcome is None:
            left.append(continuing(overrides, saved.path))
        elif isinstance(outcome, Exception):
            there.append(JobEnded(name, FAILED, path, str(outcome)))
        else:
            there.append(JobEnded(name, SKIPPED, path))
    return there, left


def _run(
    plan: SweepPlan, folder: Path, skipped: int, command: str, as_json: bool
) -> list[JobEnded]:
    """Run a sweep's jobs, and return how each ended."""
    with folder_of_notes(folder) as notes:
        job = SweepJob(plan, notes, time.time(), os.getpid(), skipped, as_json)
        try:
            with watched(job):
                _by_hydra([*plan.arguments, *_of_sweeper(plan)], job)
        except KeyboardInterrupt as stopped:
            raise type(stopped)(job.tally().stopped(command)) from None
        except Exception as error:
            # Optuna's, if no trial came to its end, says less than the jobs themselves.
            if str(error) != NO_TRIAL or not any(one.kind == FAILED for one in job.ended()):
                _report(job.ended(), as_json=False)
                raise
        return job.ended()


@contextmanager
def folder_of_notes(folder: Path) -> Iterator[Path]:
    """Yield a folder for the notes of a sweep's jobs, and remove those of sweeps that were killed.

    A sweep holds a lock in its folder, so another one can tell that it goes on.
    """
    with ExitStack() as stack:
        with FileLock(folder / f"{NOTES}lock"):  # no folder is without its lock when others look
            for left in folder.glob(f"{NOTES}*/"):
                with suppress(Timeout), FileLock(left / LOCK, timeout=0):
                    rmtree(left, ignore_errors=True)
            made = TemporaryDirectory(prefix=NOTES, dir=folder, ignore_cleanup_errors=True)
            notes = Path(stack.enter_context(made))
            stack.enter_context(FileLock(notes / LOCK))
        yield notes


def _report(ended: Sequence[JobEnded], as_json: bool) -> bool:
    """Name the jobs that failed, and return true if there is none."""
    failed = [one for one in ended if one.kind == FAILED]
    for one in ended if as_json else ():
        if one not in failed:
            print(json.dumps(SavedRun(Path(one.path)).summary))
    for one in failed:
        print(f"fedpeft: {one.name} failed: {one.reason}", file=sys.stderr)
    return not failed


def _of_sweeper(plan: SweepPlan) -> list[str]:
    """Return the settings that a sweeper that optimises needs and the user does not give.

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
    keys = {key_of(argument) for argument in plan.arguments}
    settings = {f"hydra.sweeper.{key}": value for key, value in wanted.items()}
    return [f"{key}={value}" for key, value in settings.items() if key not in keys]


def _by_hydra(overrides: Sequence[str], job: SweepJob) -> None:
    """Hand over to Hydra, whose launcher and sweeper the configuration may choose."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # an error arrives here, and not as a trace
    before = sys.argv
    sys.argv = ["fedpeft", "--multirun", *overrides]
    try:
        main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
