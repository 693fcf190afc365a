"""A trial shows a run's log, also where the stream of it breaks, and supervises its programs."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.deployment import trial as module
from fedpeft.deployment.processes import Processes, Program
from fedpeft.deployment.trial import Trial


class Broken(Trial):
    """Each stream of the log gives one line more than the last one, and breaks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.streams = 0
        self.statuses: Iterator[str] = iter(())

    def place(self, name: str) -> list[str | Path]:
        self.streams += 1
        return [sys.executable, "-c", f"for n in range({self.streams}): print('line', n)"]

    def submit(self, app: Path, overrides: list[str]) -> str:
        return "7"

    def status(self, run: str) -> dict[str, Any]:
        return {"status": next(self.statuses), "status-details": "why", "elapsed": 5.0}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    return Broken(tmp_path)


def test_a_broken_stream_of_the_log_does_not_end_the_run(
    broken: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    broken.statuses = iter(["pending", "running", "running", "finished:completed"])
    broken.run(Path(), [])
    printed = capsys.readouterr()
    assert printed.out == "line 0\nline 1\nline 2\n"  # no line twice
    assert printed.err == "run 7 completed in 5 s\n"


def test_a_run_that_failed_is_an_error(broken: Broken) -> None:
    broken.statuses = iter(["running", "finished:failed"])
    with pytest.raises(RuntimeError, match="run 7 did not complete: finished:failed why"):
        broken.run(Path(), [])


def test_a_program_that_ends_starts_again_and_one_that_ends_soon_waits_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    processes, clock = Processes(tmp_path), [0.0]

    class Ended:
        def poll(self) -> int:
            return 3

    def start(program: Program) -> None:
        starts.append(clock[0])
        processes.started[program.name] = Ended()  # type: ignore[assignment]
        if len(starts) == 5:
            raise KeyboardInterrupt

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        processes.keep([Program("x", ["x"])])
    waits = [later - earlier for earlier, later in zip(starts, starts[1:], strict=False)]
    assert waits == pytest.approx([1, 2, 4, 8], abs=0.5)


def test_programs_are_stopped_with_their_children(tmp_path: Path) -> None:
    sleep = "import time; time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    processes = Processes(tmp_path, tmp_path)
    processes.start(Program("x", [sys.executable, "-c", code]))
    begun = time.monotonic()
    processes.stop()
    assert time.monotonic() - begun < 9  # by SIGTERM, before SIGKILL would come
    assert processes.ended() == {"x": -15}
