"""The Flower ServerApp."""

from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.config import load as configuration
from fedpeft.engine.engine import open_engine
from fedpeft.reporting.progress import Display
from fedpeft.reporting.run_directory import RunDirectory
from fedpeft.server.run import Run
from fedpeft.server.strategy import FederatedPEFT

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve ``flwr run``, whose run configuration carries the ``overrides``."""
    overrides = str(context.run_config.get("overrides", ""))
    serve(grid, configuration.split(overrides))


def serve(grid: Grid, overrides: list[str], display: Display | None = None) -> dict[str, Any]:
    """Run all rounds of one configuration and return its summary.

    Args:
        grid: reaches the clients' nodes.
        overrides: the configuration.
        display: shows the rounds; null for one on standard output.
    """
    display = display or Display()
    tree = configuration.composed(overrides)
    sent = configuration.sent(overrides)
    engine = open_engine(sent, None)  # in one process, the clients' engine too
    engine.rows.examples("validation")
    label = type(engine.config.method).__name__
    directory = RunDirectory(tree.run_dir, tree, label)
    run = Run(FederatedPEFT(sent, engine), directory, display)
    weights = " (RANDOM WEIGHTS)" if engine.config.model.random else ""
    display.start(f"{label}{weights}: {directory.path}", engine.config.num_rounds)
    try:
        return run.serve(grid)
    finally:
        display.stop()
