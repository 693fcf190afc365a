"""Trackers: each gets a run's configuration, every round's numbers once, the summary and the end.

A tracker reads the run's own files, so a round that it could not take is written after the next.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedpeft.config.choices import choices
from fedpeft.config.compose import leaves
from fedpeft.files import replacing
from fedpeft.reporting.observer import Line, Observer
from fedpeft.reporting.saved_runs import SavedRun

Numbers = dict[str, float]
# Writes the model of a run's directory, the first argument, into a new folder, the second. It is
# handed in, because the modules that export stand above this package and import torch.
Export = Callable[[Path, Path], object]
STATE = "tracked.json"  # in a tracker's folder: its run's id and the last round that it has


class Session(ABC):
    """A run that is open in a tracker.

    Attributes:
        id: names the run there, so that it can go on later.
        last: last round that the tracker says it has; -1 if it has none or cannot say.
    """

    id: str
    last: int = -1

    @abstractmethod
    def write(self, round: int, numbers: Numbers) -> None:
        """Write a round's numbers.

        Args:
            round: the round's number, which is the step.
            numbers: finite numbers by name.
        """

    @abstractmethod
    def end(
        self, status: str, reason: str, summary: Mapping[str, Any] | None, export: Export
    ) -> str:
        """Write how the run ended.

        Args:
            status: ``completed``, ``stopped`` or ``failed``.
            reason: one sentence; empty if the run is completed.
            summary: the run's summary; null if it has none.
            export: writes the model of a completed run.

        Returns:
            A note for whoever reads the run's output, or nothing.
        """

    @abstractmethod
    def close(self) -> None:
        """End what the tracker started: threads, processes, files."""


class Tracker(ABC):
    """The settings of a tracker; derived classes are dataclasses.

    Attributes:
        name: name of the tracker's file in conf/logger, of the extra, and of the folder in a run's
            directory.
        module: Python module that is there if the extra is installed.
    """

    name: ClassVar[str]
    module: ClassVar[str]

    def check(self) -> None:
        """Check that the extra is installed, without importing it.

        Raises:
            ValueError: the extra is not installed.
        """
        if find_spec(self.module) is None:
            raise ValueError(
                f"logger={self.name} needs the package {self.module}: "
                f"pip install 'fedpeft[{self.name}]'"
            )

    @abstractmethod
    def open(self, run: SavedRun, folder: Path, id: str | None, done: int) -> Session:
        """Begin a run in the tracker, or go on with one.

        Args:
            run: the run, whose directory is read.
            folder: takes what the tracker writes on this machine; it is there.
            id: the earlier session's id; null to begin.
            done: last round that was written; -1 for none.

        Raises:
            Exception: the tracker refuses or cannot be reached. Nothing is left open then.
        """


class Tracking(Observer):
    """Observes a run for a tracker.

    A tracker that cannot begin ends the run before its first round. One that fails later is opened
    again after each further round, so that a short failure leaves no gap.

    Args:
        tracker: the settings.
        run_dir: the run's directory; it holds the configuration when the run begins.
        note: takes sentences for the run's output, such as on the first failure.
        export: writes the model of a run that is completed.
    """

    def __init__(
        self, tracker: Tracker, run_dir: str, note: Callable[[str], None], export: Export
    ) -> None:
        self.tracker, self._tell, self._export = tracker, note, export
        self.path = Path(run_dir)
        self.folder = self.path / tracker.name
        self.session: Session | None = None
        self.begun = self.failed = False
        self.last, self.hash = -1, ""

    def start(self, title: str, num_rounds: int) -> None:
        """Begin, or go on with what an earlier process began, and write the rounds that it lacks.

        Raises:
            ValueError: the tracker cannot begin.
        """
        try:
            self._write_missing()
        except Exception as error:
            reason = f"logger={self.tracker.name} cannot begin: {_text(error)}"
            if self.session is not None:
                with suppress(Exception):
                    self.session.end("failed", reason, None, self._export)
            self._close()
            raise ValueError(reason) from error
        self.begun = True

    def round_done(self, line: Line) -> None:
        """Write a round; rounds that are repeated from a checkpoint are there already."""
        if self.session is not None and line["round"] == self.last + 1:
            self._safely(partial(self._write, line))
        else:
            self._safely(self._write_missing)

    def stop(self, status: str = "completed", reason: str = "") -> None:
        """Write the end, and close."""
        try:
            if self.begun:
                self._end(status, reason)
        except Exception as error:  # must not end the run
            lacking = "it lacks the end of the run"
            self._tell(f"logger={self.tracker.name} failed: {_text(error)}; {lacking}")
        finally:
            self._close()

    def _end(self, status: str, reason: str) -> None:
        self._write_missing()
        assert self.session is not None
        summary = SavedRun(self.path).summary if status == "completed" else None
        if text := self.session.end(status, reason, summary, self._export):
            self._tell(text)

    def _safely(self, act: Callable[[], None]) -> None:
        """Do something with the tracker, whose failure must not end the run."""
        try:
            act()
        except Exception as error:
            self._close()
            if not self.failed:
                self.failed = True
                again = "the run goes on, and each further round tries again"
                self._tell(f"logger={self.tracker.name} failed: {_text(error)}; {again}")

    def _write_missing(self) -> None:
        if self.session is None:
            self._open()
        for line in SavedRun(self.path).lines:
            if line["round"] > self.last:
                self._write(line)

    def _open(self) -> None:
        run = SavedRun(self.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / STATE
        known = json.loads(file.read_text()) if file.exists() else {}
        self.hash = run.hash
        # The file may be of another run, which ended before its first round.
        if known.get("hash") != self.hash:
            known = {"id": None, "round": -1}
        done = max(self.last, known["round"])
        self.session = self.tracker.open(run, self.folder, known["id"], done)
        self.last = max(done, self.session.last)
        self._keep()

    def _write(self, line: Line) -> None:
        assert self.session is not None
        self.session.write(line["round"], numbers(line))
        self.last = line["round"]
        self._keep()

    def _keep(self) -> None:
        assert self.session is not None
        state = {"id": self.session.id, "round": self.last, "hash": self.hash}
        with replacing(self.folder / STATE) as draft:
            draft.write_text(json.dumps(state))

    def _close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            with suppress(Exception):
                session.close()


def numbers(values: Mapping[str, Any]) -> Numbers:
    """Return the finite numbers of a round's line, without single clients' numbers."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the texts and numbers of a summary by dotted key, without lists.

    The reasons why single clients were refused are left out too, because these sentences are not
    for others, and would make a key a client and round.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key == "refused":
            continue
        if isinstance(value, Mapping):
            result |= flat(value, f"{before}{key}.")
        elif value is not None and not isinstance(value, list):
            result[before + key] = value
    return result


def settings(run: SavedRun) -> dict[str, Any]:
    """Return a run's configuration by dotted key, with its directory and its hash."""
    return leaves(run.config) | {"run_dir": str(run.path.resolve()), "run_hash": run.hash}


def tags(run: SavedRun) -> dict[str, str]:
    """Return the words by which runs are told apart in a list."""
    chosen = choices(run.settings)
    names = {group: str(chosen[group]) for group in ("method", "data", "strategy")}
    return names | {"seed": str(run.config.seed)}


def _text(error: Exception) -> str:
    """Return an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
