"""The Flower ServerApp."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.config import load as configuration
from fedpeft.config.compose import composed
from fedpeft.config.message import for_clients
from fedpeft.config.overrides import split
from fedpeft.engine.engine import open_engine
from fedpeft.export.run import open_run
from fedpeft.export.write import export
from fedpeft.reporting.json_log import JsonLog
from fedpeft.reporting.observer import Observer, Observers
from fedpeft.reporting.progress import Display
from fedpeft.reporting.prometheus import Metrics
from fedpeft.reporting.run_directory import RunDirectory, run_path
from fedpeft.reporting.run_files import finished
from fedpeft.reporting.trackers.base import Tracking
from fedpeft.server.check import check
from fedpeft.server.run import Run
from fedpeft.server.seen import RoundFailed
from fedpeft.server.strategy import FederatedPEFT
from fedpeft.server.summary import row_notes
from fedpeft.wire import sentence

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve ``flwr run``, whose run configuration carries the ``overrides``.

    Raises:
        ValueError: ``check=true`` found problems.
    """
    overrides = split(str(context.run_config.get("overrides", "")))
    if configuration.settings(overrides).check:
        report = check(grid, overrides)
        report.show()
        if report.problems:
            raise ValueError("; ".join(report.problems))
    elif finished(composed(overrides)) is None:
        serve(grid, overrides, command="flwr run")


def serve(
    grid: Grid,
    overrides: list[str],
    display: Display | None = None,
    command: str = "fedpeft run",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run all rounds of one configuration and return its summary.

    Args:
        grid: reaches the clients' nodes.
        overrides: the configuration.
        display: shows the rounds, unless ``logs=json``; null for one on standard output.
        command: starts such a run; the summary has it.
        notes: sentences to show before round 0, with those on the rows.

    Raises:
        ValueError: ``check=true``, which is no run.
    """
    tree = composed(overrides)
    settings = configuration.settings(overrides)
    if settings.check:
        raise ValueError("check=true is for flwr run; on this machine it is: fedpeft check")
    sent = for_clients(overrides)
    engine = open_engine(sent, None)  # in one process, the clients' engine too
    engine.rows.read_all()
    label = type(engine.config.method).__name__
    with run_path(settings.run_dir, label) as path:
        observer = _observer(overrides, path, display)
        directory = RunDirectory(path, tree, settings.resume, overrides)
        if directory.ended is not None:
            directory.close()
            return directory.ended
        try:
            strategy = FederatedPEFT(overrides, engine)
            run = Run(strategy, directory, settings.checkpoint, observer, command)
            if settings.resume:
                run.resume()
        except BaseException:
            directory.discard()
            raise
        try:
            return _run(run, grid, label, notes)
        finally:
            directory.close()


def _observer(overrides: list[str], path: str, display: Display | None) -> Observer:
    """Return the observers that the configuration chooses."""
    settings = configuration.settings(overrides)
    shown = JsonLog(path) if settings.logs == "json" else display or Display()
    port = settings.metrics_port
    metrics = [] if port is None else [Metrics(port)]
    chosen = configuration.trackers(overrides)
    trackers = [Tracking(tracker, path, shown.note, _export) for tracker in chosen]
    return Observers([shown, *metrics, *trackers])


def _export(run_dir: Path, to: Path) -> None:
    """Write a completed run's model, as ``fedpeft export`` does."""
    export(open_run(run_dir), to)


def _run(run: Run, grid: Grid, label: str, notes: Sequence[str]) -> dict[str, Any]:
    """Run the rounds that are left, and tell the observer how the run ended.

    Raises:
        KeyboardInterrupt: somebody stopped the run; the message says how to go on.
    """
    engine = run.engine
    weights = " (RANDOM WEIGHTS)" if engine.config.model.random else ""
    ended = "completed", ""
    try:
        run.observer.start(f"{label}{weights}: {run.directory.path}", engine.config.num_rounds)
        for note in [*row_notes(engine), *notes]:
            run.observer.note(note)
        return run.serve(grid)
    except KeyboardInterrupt as stopped:
        ended = "stopped", run.stopped()
        raise type(stopped)(run.stopped()) from None
    except RoundFailed as failed:
        ended = "failed", f"{failed}; {run.stopped(str(failed))}"
        raise RoundFailed(ended[1]) from failed
    except Exception as error:
        ended = "failed", sentence(error)
        raise
    finally:
        if ended[1]:
            with suppress(OSError):  # a full disk may be why the run ended, and that error counts
                run.directory.stop(ended[1])
        run.observer.stop(*ended)
