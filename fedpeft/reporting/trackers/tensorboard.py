"""TensorBoard: event files in the run's directory, for ``tensorboard --logdir runs``."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.reporting.saved_runs import SavedRun
from fedpeft.reporting.trackers.base import Export, Numbers, Session, Tracker, settings, tags


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """Writes event files; the configuration stands in the tab HPARAMS, and texts in TEXT."""

    name = "tensorboard"
    module = "tensorboard"

    def open(self, run: SavedRun, folder: Path, id: str | None, done: int) -> Session:
        """Begin a new event file, which may be the run's second; see ``Tracker.open``."""
        return _Events(run, folder, done)


class _Events(Session):
    """An event file."""

    def __init__(self, run: SavedRun, folder: Path, done: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # an extra, without types
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.id, self.round = str(folder), max(done, 0)
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._scalar, self._text = scalar_pb, text_pb
        self._file = EventFileWriter(str(folder))
        try:
            # Readers drop what an earlier process wrote of the rounds that now follow.
            begin = events.SessionLog(status=events.SessionLog.START)
            self._file.add_event(self._event(step=done + 1, session_log=begin))
            if done < 0:
                whole = tags(run) | _texts(settings(run))
                self._add(0, hparams_pb(whole), text_pb("configuration", _table(whole)))
            self._file.flush()
        except BaseException:
            self.close()
            raise

    def _add(self, step: int, *summaries: Any) -> None:
        whole = self._summary(value=[value for summary in summaries for value in summary.value])
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=whole))

    def write(self, round: int, numbers: Numbers) -> None:
        self._add(round, *(self._scalar(name, value) for name, value in numbers.items()))
        self._file.flush()
        self.round = round

    def end(
        self, status: str, reason: str, summary: Mapping[str, Any] | None, export: Export
    ) -> str:
        texts = [self._text("status", f"{status}: {reason}" if reason else status)]
        if summary is not None:
            shown = "\n".join(f"    {line}" for line in json.dumps(summary, indent=2).split("\n"))
            texts.append(self._text("summary", shown))  # indented, so Markdown keeps it as it is
        self._add(self.round, *texts)
        self._file.flush()
        return ""

    def close(self) -> None:
        self._file.close()


def _texts(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return values with lists and null as text, because the tab HPARAMS knows none."""
    return {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}


def _table(values: Mapping[str, Any]) -> str:
    """Return values as a table in Markdown."""
    rows = [f"| {key} | `{value}` |" for key, value in values.items()]
    return "\n".join(["| key | value |", "|---|---|", *rows])
