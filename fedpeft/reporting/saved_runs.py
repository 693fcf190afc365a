"""Runs on the disk: found under folders, read, and grouped by what sets them apart."""

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedpeft.config.compose import leaves
from fedpeft.files import read_json
from fedpeft.reporting.run_files import (
    CONFIG,
    FAILURE,
    METRICS,
    OVERRIDES,
    STOPPED,
    SUMMARY,
    is_free,
    read_config,
    read_metrics,
)

Outcome = dict[str, Any] | Exception  # a run's summary, or the error that ended it
# In the error of training that diverged.
_DIVERGED = re.compile(r"\bnot finite\b|\btraining loss is ")
COMPLETED, DIVERGED, UNFINISHED = "completed", "diverged", "unfinished"  # states of a saved run


def diverged(reason: str) -> bool:
    """Tell whether a run ended because training diverged, as it would again."""
    return bool(_DIVERGED.search(reason))


@dataclass(frozen=True)
class SavedRun:
    """A run's directory, whose files are read when they are first asked for.

    Args:
        path: the run's directory.
    """

    path: Path

    @cached_property
    def config(self) -> DictConfig:
        """The composed configuration."""
        return read_config(self.path)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the rounds; none if the run ended before its first."""
        return read_metrics(self.path) if (self.path / METRICS).exists() else []

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """The summary; null if the run did not come to its end."""
        file = self.path / SUMMARY
        return read_json(file) if file.exists() else None

    @property
    def final_summary(self) -> dict[str, Any]:
        """The summary of a run that came to its end, as each counted run of a report did."""
        assert self.summary is not None, f"{self.path} has no summary"
        return self.summary

    @property
    def inputs(self) -> tuple[Path, DictConfig, dict[str, Any]]:
        """Path, configuration and summary, by which ``inputs.py`` compares what runs have read."""
        return self.path, self.config, self.summary or {}

    @property
    def status(self) -> str:
        """``completed``, ``diverged``, or ``unfinished``: it still goes on, or was ended."""
        if self.summary is not None:
            return COMPLETED
        return DIVERGED if (self.path / FAILURE).exists() else UNFINISHED

    def outcome(self) -> Outcome | None:
        """Return how the run ended; null if it is to begin or to go on.

        Training that diverged is an outcome, because it would diverge again.
        """
        if self.status == DIVERGED:
            return RuntimeError((self.path / FAILURE).read_text())
        return self.summary

    def note(self, outcome: Outcome) -> None:
        """Note in the directory, if there is one, that training diverged."""
        if isinstance(outcome, Exception) and diverged(str(outcome)) and self.path.is_dir():
            (self.path / FAILURE).write_text(str(outcome))

    @property
    def reason(self) -> str:
        """Say why the run has no summary; empty if it has one."""
        if self.summary is not None:
            return ""
        for name in (FAILURE, STOPPED):
            if (self.path / name).exists():
                return (self.path / name).read_text().strip()
        done = f"after round {self.lines[-1]['round']}" if self.lines else "before round 0 ended"
        return f"{done} of {self.config.num_rounds}: it still goes on, or was ended from outside"

    @cached_property
    def overrides(self) -> list[str] | None:
        """The overrides that composed the configuration; null if the run did not save them."""
        file = self.path / OVERRIDES
        return read_json(file) if file.exists() else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration's values by dotted key, without the keys that change no result."""
        return settings_of(self.config)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, the same for two runs that must give the same results."""
        return hash_of(self.settings)

    @property
    def hash_but_seed(self) -> str:
        """The same for runs that differ in nothing but the seed."""
        return hash_of({key: value for key, value in self.settings.items() if key != "seed"})


def settings_of(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration's values by dotted key, without keys that ``FREE`` names."""
    return {key: value for key, value in leaves(config).items() if not is_free(key)}


def hash_of(settings: dict[str, Any]) -> str:
    """Return the hash of a run's settings, see ``SavedRun.hash``."""
    text = json.dumps(alike(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def alike(value: Any) -> Any:
    """Return a value in which equal numbers are of one type, because ``lr=1`` and ``lr=1.0`` are.

    The schema makes both a float before a run, and an int has no value with a point.
    """
    if isinstance(value, dict):
        return {key: alike(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [alike(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def saved_runs(folders: Sequence[Path]) -> list[SavedRun]:
    """Find the runs in folders and in all folders below them.

    Args:
        folders: folders of runs, studies or sweeps; a run that two of them hold is returned once.

    Returns:
        The runs, sorted by path.

    Raises:
        ValueError: a folder is not there, or holds no run, or a finished run lacks a file.
    """
    by_path: dict[Path, SavedRun] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give the directory of a run, or one above it")
        names = (METRICS, FAILURE, SUMMARY)
        paths = sorted({file.parent for name in names for file in folder.rglob(name)})
        runs = [path for path in paths if _is_run(path)]
        if not runs:
            raise ValueError(f"{folder} holds no run: none of its folders has {METRICS}")
        by_path |= {
            path.resolve(): SavedRun(path) for path in runs if path.resolve() not in by_path
        }
    return sorted(by_path.values(), key=lambda run: run.path)


def _is_run(path: Path) -> bool:
    """Tell whether a folder with a file of a run's name is a run's directory.

    Raises:
        ValueError: the folder is a finished run's, and lacks a file, so that tables would lack the
            run.
    """
    there = {name for name in (CONFIG, METRICS, SUMMARY) if (path / name).exists()}
    if SUMMARY in there and (there & {CONFIG, METRICS}) and len(there) < 3:
        (lacking,) = {CONFIG, METRICS} - there
        raise ValueError(
            f"{path} has no {lacking}, but a finished run's {SUMMARY}: bring it back, or remove "
            "the run"
        )
    return CONFIG in there


def chosen_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the directories of the runs with each method's chosen learning rate.

    Args:
        folders: folders of studies, or folders above; each ``runs.csv`` says which runs these are.

    Raises:
        ValueError: a folder holds no study, or a row of its ``runs.csv`` is not whole or does
            not say whether the run was chosen.
    """
    paths: list[Path] = []
    for folder in folders:
        # A report below a study has a runs.csv of its own, but no study.md.
        files = [page.with_name("runs.csv") for page in sorted(folder.rglob("study.md"))]
        if not files:
            raise ValueError(f"{folder} holds no study: none of its folders has study.md")
        for file in files:
            paths += [
                file.parent / directory(row["method"], float(row["lr"]), int(row["seed"]))
                for row in _rows_of(file)
                if row["chosen"] == "True"
            ]
    return paths


def _rows_of(file: Path) -> list[dict[str, str]]:
    """Return the rows of a study's ``runs.csv``.

    Raises:
        ValueError: a row is not whole, or does not say whether the run was chosen.
    """
    with file.open(newline="") as opened:
        text = opened.read()
    rows = list(csv.DictReader(StringIO(text, newline="")))
    said = (row.get("chosen") in ("True", "False") and None not in row.values() for row in rows)
    if not rows or not text.endswith("\n") or not all(said):
        raise ValueError(
            f"{file} does not say of each run whether it was chosen: give the study's command again"
        )
    return rows


def directory(entry: str, lr: float, seed: int) -> Path:
    """Return the directory of a study's run, below the study's folder.

    Args:
        entry: label of the run's method.
        lr: the run's learning rate.
        seed: the run's seed.
    """
    return Path(entry.replace("/", "_"), f"lr={lr}", f"seed={seed}")


def differing(runs: Sequence[SavedRun]) -> list[str]:
    """Return the dotted keys whose value is not the same in all of these runs, sorted."""
    keys = sorted({key for run in runs for key in run.settings})
    absent = object()
    values = {key: {repr(alike(run.settings.get(key, absent))) for run in runs} for key in keys}
    return [key for key in keys if len(values[key]) > 1]


def one_a_seed(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """Return the first run of each seed; others are copies, which would count a seed twice."""
    first: dict[Any, SavedRun] = {}
    for run in runs:
        first.setdefault(run.settings["seed"], run)
    return list(first.values())


def by_setting(runs: Sequence[SavedRun]) -> list[list[SavedRun]]:
    """Group runs that differ in nothing but the seed, each group sorted by seed.

    Groups come in the order of their first run.
    """
    groups: dict[str, list[SavedRun]] = {}
    for run in runs:
        groups.setdefault(run.hash_but_seed, []).append(run)
    return [sorted(group, key=lambda run: run.settings["seed"]) for group in groups.values()]
