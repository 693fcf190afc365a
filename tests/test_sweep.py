"""Sweeps: runs that are there are skipped, broken ones go on, failed ones are named at the end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hydra import compose

from fedpeft.config.compose import composing
from fedpeft.config.schema import ConfigError
from fedpeft.config.sweeps import BASIC, plan
from fedpeft.reporting.progress import Display, Tally, duration
from fedpeft.reporting.saved_runs import SavedRun, hash_of, saved_runs
from fedpeft.simulation import job
from fedpeft.simulation.job import SweepJob
from fedpeft.simulation.sweep import NO_TRIAL, folder_of_notes, sweep
from tests.conftest import quiet

Command = Callable[..., str]
FOLDER = Path("runs/sweep")


def runs_by(key: str, folder: Path = FOLDER) -> dict[Any, SavedRun]:
    """Return the runs below a folder by the value of a setting."""
    return {run.settings[key]: run for run in saved_runs([folder])}


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_knows_all_jobs_and_what_sets_them_apart() -> None:
    planned = plan(["num_rounds=3", "method=scl,lora", "lr=0.1,0.01", "run_dir=here", "seed=7"])
    assert (planned.folder, planned.total, planned.all_known) == ("here", 4, True)
    assert [planned.label(job) for job in planned.jobs] == [
        "method=scl lr=0.1",
        "method=scl lr=0.01",
        "method=lora lr=0.1",
        "method=lora lr=0.01",
    ]
    assert all({"num_rounds=3", "seed=7"} <= set(job) for job in planned.jobs)
    assert planned.arguments[-1] == "hydra.sweep.dir='here'"
    assert plan(["seed=range(0,3)"]).folder == "runs/sweep"
    assert plan(["seed=0,1", "run_dir=results,2024"]).folder == "results,2024"
    assert plan(["seed=range(0,3)"]).total == 3
    one = plan(["seed=1"])
    assert one.label(one.jobs[0]) == "seed=1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lr=interval(0.1,0.2)"], "is no list of values: set hydra/sweeper=optuna"),
        (["--cfg", "job"], "a sweep takes overrides alone, got --cfg"),
        (["lrr=3", "seed=1,2"], "unknown key lrr"),
        (["seed=range(3,3)"], r"seed=range\(3,3\) has no value, so the sweep has no job"),
        (["hydra.sweep.subdir=a", "lr=1,2"], r"must not be set, .* got hydra\.sweep\.subdir=a"),
        (["hydra/sweeper=nope", "seed=1,2"], "hydra/sweeper must be one of .*basic.*, got nope"),
    ],
)
def test_plans_that_are_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(arguments)


# --- what an upgrade of Hydra or Optuna may change ------------------------------------------------


def test_hydra_s_basic_sweeper_has_its_private_name() -> None:
    with composing():
        sweeper = compose("config", return_hydra_config=True).hydra.sweeper._target_
    assert sweeper == BASIC, f"Hydra's basic sweeper is {sweeper} now: see fedpeft/config/sweeps.py"


@pytest.mark.filterwarnings("ignore:The ``declarative_base:DeprecationWarning")  # Optuna 2's
def test_optuna_s_sentence_for_no_trial_is_known() -> None:
    optuna = pytest.importorskip("optuna")
    with pytest.raises(ValueError) as raised:
        _ = optuna.create_study().best_trial
    assert str(raised.value) == NO_TRIAL, (
        f"Optuna says {raised.value} now: see NO_TRIAL in fedpeft/simulation/sweep.py"
    )


# --- counting -------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_the_runs_so_far() -> None:
    tally = Tally(12, skipped=2, started=time.time() - 300)
    assert tally.text() == "2 of 12 runs done, 2 of them skipped, 0 failed"
    for failed in (False, False, True):
        tally.add(failed)
    said = "4 of 12 runs done, 2 of them skipped, 1 failed, about 12 min left"  # 300 s / 3 x 7
    assert tally.text() == said
    assert tally.stopped("fedpeft go") == "stopped with 4 of 12 runs done, this goes on: fedpeft go"
    again = Tally(4, done=1, failed=2, earlier=2, started=time.time() - 300)
    assert again.text().endswith("2 failed, about 5 min left")  # earlier failures took no time
    assert Tally(None, done=3).text() == "3 runs done, 0 of them skipped, 0 failed"
    assert Tally(1, done=1).text() == "1 of 1 runs done, 0 of them skipped, 0 failed"


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.2, "40 s"), (90, "2 min"), (5399, "90 min"), (12240, "3.4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- with real runs in this process ---------------------------------------------------------------


def test_a_sweep_is_done_again_with_more_values(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("run", "-m", *base, "lr=1e-3,1e30")
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fedpeft: lr=1e+30 failed: no client's reply was usable; client 0:")
    assert shown.err.count("\n") == 1
    assert "\n1 of 2 runs done, 0 of them skipped, 1 failed\n" in shown.out
    runs = runs_by("lr")
    assert [run.path.name for run in runs.values()] == [run.hash for run in runs.values()]
    assert {lr: run.status for lr, run in runs.items()} == {1e-3: "completed", 1e30: "diverged"}
    times = {run.path: (run.path / "metrics.jsonl").stat().st_mtime_ns for run in runs.values()}

    text = fedpeft("run", "-m", *base, "lr=2e-3,1e-3", "seed=0")
    assert text.startswith("skipped, because the results are there: lr=0.001\nlr=0.002\nLoRA: ")
    assert text.endswith("\n2 of 2 runs done, 1 of them skipped, 0 failed\n")
    assert set(runs_by("lr")) == {1e-3, 2e-3, 1e30}
    assert {p: (p / "metrics.jsonl").stat().st_mtime_ns for p in times} == times

    with pytest.raises(SystemExit) as ended:
        fedpeft("run", "-m", "--json", *base, "lr=2e-3,1e-3,1e30")
    assert ended.value.code == 2
    shown, runs = capsys.readouterr(), runs_by("lr")
    summaries = [json.loads(line) for line in shown.out.splitlines()]
    assert summaries == [runs[2e-3].summary, runs[1e-3].summary]
    assert "fedpeft: lr=1e+30 failed" in shown.err  # what diverged is named again, and not run


def test_a_broken_run_goes_on_from_its_checkpoint(fedpeft: Command, base: list[str]) -> None:
    fedpeft("run", "-m", *base, "seed=3", "run_dir=mine")
    whole = runs_by("seed", Path("mine"))[3]
    lines, summary = whole.lines, whole.summary
    assert summary is not None
    (whole.path / "summary.json").unlink()
    (whole.path / "checkpoints" / "round_00002.safetensors").unlink()
    fedpeft("run", "-m", *base, "seed=3", "run_dir=mine")
    again = SavedRun(whole.path)
    assert again.summary is not None and again.lines[:2] == lines[:2]  # with their seconds
    assert again.summary["shared_state_sha256"] == summary["shared_state_sha256"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("method.rank=4,400", "lora+method.rank=400: method.rank must be <= 32"),
        ("lr=1e-3,-1", "lr must be > 0, got -1"),
        ("method.rnak=4,8", "unknown key method.rnak"),
        ("data.path=/nowhere,/neither", "data.path=/nowhere is no folder or file"),
    ],
)
def test_all_jobs_are_checked_before_the_first_runs(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str], values: str, says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        fedpeft("run", "-m", *base, values)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fedpeft: ") and says in error and error.count("\n") == 1
    assert not list(FOLDER.glob("*"))


def test_two_jobs_of_one_run_are_refused(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fedpeft("run", "-m", *base, "checkpoint.keep=1,2")
    assert capsys.readouterr().err == (
        "fedpeft: two jobs of the sweep are the same run: checkpoint.keep=1 and checkpoint.keep=2 "
        "differ in nothing that changes its result\n"
    )


def test_equal_numbers_have_one_hash(fedpeft: Command, base: list[str]) -> None:
    assert hash_of({"a": [1, 2.5], "b": None}) == hash_of({"a": [1.0, 2.5], "b": None})
    assert hash_of({"a": 1.5}) != hash_of({"a": 1}) != hash_of({"a": "1"})
    with pytest.raises(ValueError, match="two jobs of the sweep are the same run: lr=1 and lr=1"):
        sweep(plan([*base, "lr=1,1.0"]), "", as_json=False)


def test_of_equal_jobs_at_once_one_runs_and_the_other_takes_its_result(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Sequence[str]] = []
    both = Barrier(2)

    def slow(overrides: Sequence[str], _: Display) -> dict[str, Any]:
        ran.append(overrides)
        time.sleep(0.3)  # the other job looks for a result in the meantime
        path = job.path_of(base, tmp_path)
        path.mkdir()
        (path / "summary.json").write_text('{"a": 1}')
        return {"a": 1}

    def run_one(_: int) -> tuple[str, Any]:
        both.wait()
        ended, outcome = job.run_once(base, "same", tmp_path, tmp_path, quiet())
        return ended.kind, outcome

    monkeypatch.setattr(job, "run", slow)
    job.path_of(base, tmp_path)  # composes, so that both threads are at the lock at once
    with ThreadPoolExecutor(2) as threads:
        ended = sorted(threads.map(run_one, range(2)))
    assert ended == [("done", {"a": 1}), ("skipped", {"a": 1})] and len(ran) == 1


def test_the_error_of_a_launcher_is_told_although_a_job_failed(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def hydra(one: SweepJob) -> Callable[[], None]:
        def launch() -> None:
            note = json.dumps(["lr=1", "failed", "", "the job's reason"])
            (one.notes / "0.json").write_text(note)
            raise RuntimeError(error)

        return launch

    monkeypatch.setattr("fedpeft.simulation.sweep.main", lambda **_: hydra)
    planned = plan([*base, "lr=1", f"run_dir={tmp_path}"])
    error = "the queue is gone"
    with pytest.raises(RuntimeError, match="the queue is gone"):
        sweep(planned, "", as_json=False)
    error = NO_TRIAL  # no news
    assert not sweep(planned, "", as_json=False)
    assert capsys.readouterr().err.count("lr=1 failed: the job's reason") == 2


def test_notes_of_a_killed_sweep_are_removed_and_those_of_one_that_goes_on_stay(
    tmp_path: Path,
) -> None:
    (tmp_path / ".jobs-killed").mkdir()
    (tmp_path / ".jobs-killed" / "0.json").write_text("[]")
    with folder_of_notes(tmp_path) as one, folder_of_notes(tmp_path) as other:
        assert {path.name for path in tmp_path.glob(".jobs-*/")} == {one.name, other.name}
        assert one != other and one.is_dir()
    assert list(tmp_path.glob(".jobs-*/")) == []


def test_each_note_is_read_once(tmp_path: Path) -> None:
    one = SweepJob(plan(["seed=1"]), tmp_path, 0.0, 1, 0, as_json=False)
    for number, kind in enumerate(("done", "failed", "failed")):
        note = ["x", kind, "", "", 0, number == 2]
        (tmp_path / f"{number}.json").write_text(json.dumps(note))
        assert [ended.kind for ended in one.ended()][-1] == kind
        (tmp_path / f"{number}.json").write_text("not read again")
    tally = one.tally()
    assert (tally.done, tally.failed, tally.earlier) == (1, 2, 1)


# --- with other processes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``declarative_base:DeprecationWarning")  # Optuna 2's
def test_joblib_s_processes_and_optuna_s_trials_skip_and_fail_too(
    fedpeft: Command, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int | str | None] = []
    in_processes = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for values in ("lr=1e-3,1e30", "lr=1e-3,2e-3,1e30"):
        with pytest.raises(SystemExit) as stopped:
            fedpeft("run", "-m", *base, *in_processes, values)
        ended.append(stopped.value.code)
    assert ended == [2, 2]
    shown = capsys.readouterr()
    assert shown.err.count("fedpeft: lr=1e+30 failed: no client's reply was usable") == 2
    assert "skipped, because the results are there: lr=0.001\n" in shown.out
    runs = runs_by("lr")
    assert {lr: run.status for lr, run in runs.items()} == {
        1e-3: "completed",
        2e-3: "completed",
        1e30: "diverged",
    }

    of_optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    with pytest.raises(SystemExit):
        fedpeft("run", "-m", *base, *of_optuna, "lr=choice(1e-3,2e-3,1e30)")
    shown = capsys.readouterr()
    assert "of 4 runs done" in shown.out and "lr=1e+30 failed" in shown.err
    best = (FOLDER / "optimization_results.yaml").read_text()
    summaries = {lr: run.summary for lr, run in runs.items() if run.summary}
    values = {lr: one["final"][one["selected_by"]] for lr, one in summaries.items()}
    assert f"best_value: {max(values.values())}" in best  # of an accuracy more is better
    assert len(saved_runs([FOLDER])) == 3  # found by their hash


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sent", "status"),
    [
        (["run", "-m", "seed=0,1,2"], signal.SIGINT, 130),
        (["study", "--methods", "lora", "--seeds", "0,1,2"], signal.SIGTERM, 143),  # as compare
    ],
)
def test_a_stopped_sweep_names_the_command_that_goes_on(
    fedpeft: Command, base: list[str], arguments: list[str], sent: signal.Signals, status: int
) -> None:
    rest = [o for o in base if not o.startswith("num_rounds=")]
    rest = rest if "-m" in arguments else [o for o in rest if not o.startswith("method=")]
    whole = [*arguments, *rest, "num_rounds=12"]
    code = "from fedpeft.cli import main; main()"
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *whole],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(Path("runs").rglob("metrics.jsonl"))) < 2:  # the second run has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    (line,) = error.strip().splitlines()
    said, _, command = line.partition(", this goes on: ")
    assert said == "fedpeft: stopped with 1 of 3 runs done"
    name, *again = shlex.split(command)
    assert name == "fedpeft"
    first = next(Path("runs").rglob("summary.json"))
    before = first.stat().st_mtime_ns
    fedpeft(*again)
    assert len(list(Path("runs").rglob("summary.json"))) == 3
    assert first.stat().st_mtime_ns == before
