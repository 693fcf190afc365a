"""The log of a run for other programs: one JSON object a line on standard error."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

from fedpeft.reporting.observer import Line, Observer
from fedpeft.reporting.run_files import finite


class JsonLog(Observer):
    """Writes each event of a run as one line, with the time in UTC and the run's directory.

    Args:
        run_dir: the run's directory, written in each line because runs may share one log.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def start(self, title: str, num_rounds: int) -> None:
        self._write("run_begun", title=title, rounds=num_rounds)

    def note(self, text: str) -> None:
        self._write("noted", note=text)

    def phase(self, name: str, clients: int) -> None:
        self._write("phase_begun", phase=name, clients=clients)

    def left_out(self, phase: str, client: int, outcome: str, reason: str) -> None:
        self._write("client_left_out", phase=phase, client=client, outcome=outcome, reason=reason)

    def round_done(self, line: Line) -> None:
        """Write the line's numbers; clients that were left out have had events of their own."""
        numbers = {k: v for k, v in line.items() if not isinstance(v, dict | list)}
        self._write("round_done", **numbers)

    def stop(self, status: str = "completed", reason: str = "") -> None:
        self._write("run_ended", status=status, **({"reason": reason} if reason else {}))

    def _write(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": now, "event": event, "run_dir": self.run_dir, **finite(facts)}
        print(json.dumps(entry, allow_nan=False), file=sys.stderr, flush=True)
