"""The Flower ServerApp."""

from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.config import load as configuration
from fedpeft.engine.engine import open_engine
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_directory import RunDirectory, finished, new_path
from fedpeft.server.run import Run
from fedpeft.server.seen import RoundFailed
from fedpeft.server.strategy import FederatedPEFT

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve ``flwr run``, whose run configuration carries the ``overrides``."""
    overrides = configuration.split(str(context.run_config.get("overrides", "")))
    if finished(configuration.composed(overrides)) is None:
        serve(grid, overrides)


def serve(grid: Grid, overrides: list[str], display: Display | None = None) -> dict[str, Any]:
    """Run all rounds of one configuration and return its summary.

    Args:
        grid: reaches the clients' nodes.
        overrides: the configuration.
        display: shows the rounds; null for one on standard output.
    """
    display = display or Display()
    tree = configuration.composed(overrides)
    settings = configuration.settings(overrides)
    sent = configuration.sent(overrides)
    engine = open_engine(sent, None)  # in one process, the clients' engine too
    engine.rows.examples("validation")
    label = type(engine.config.method).__name__
    directory = RunDirectory(settings.run_dir or new_path(label), tree, settings.resume)
    try:
        run = Run(FederatedPEFT(sent, engine), directory, settings.checkpoint, display)
        if settings.resume:
            run.resume()
        return _run(run, grid, label)
    finally:
        directory.close()


def _run(run: Run, grid: Grid, label: str) -> dict[str, Any]:
    """Run the rounds that are left, on a display.

    Raises:
        KeyboardInterrupt: somebody stopped the run; the message says how to go on.
    """
    display, engine = run.display, run.engine
    weights = " (RANDOM WEIGHTS)" if engine.config.model.random else ""
    display.start(f"{label}{weights}: {run.directory.path}", engine.config.num_rounds)
    try:
        return run.serve(grid)
    except KeyboardInterrupt as stopped:
        raise type(stopped)(run.stopped()) from None
    except RoundFailed as failed:
        raise RoundFailed(f"{failed}; {run.stopped()}") from failed
    finally:
        display.stop()
