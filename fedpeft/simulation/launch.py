"""Runs configurations with virtual clients: on Ray's workers, or in one process."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.config import load as configuration
from fedpeft.config.compose import composed
from fedpeft.config.message import for_clients
from fedpeft.config.overrides import quoted, split
from fedpeft.config.runtime import Runtime
from fedpeft.reporting.progress import Display, Tally
from fedpeft.reporting.run_directory import InUse, run_path
from fedpeft.reporting.run_files import finished
from fedpeft.simulation.ahead import check_early, check_loaded
from fedpeft.simulation.stop import sigterm_kept

if TYPE_CHECKING:
    from fedpeft.simulation.grid import LocalGrid


@contextmanager
def local_grid(
    num_clients: int, runtime: Runtime, before: Callable[[], None] = lambda: None
) -> "Iterator[LocalGrid]":
    """Yield a grid of this machine, or of the Ray cluster that it belongs to.

    Args:
        num_clients: number of nodes.
        runtime: chooses Ray's workers or this process.
        before: is called first, while Ray starts; its error ends the run.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if runtime.kind == "inprocess":
        before()
        from fedpeft.simulation.grid import InProcessGrid  # torch comes with it

        yield InProcessGrid(num_clients)
        return
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(before)
        import ray  # takes seconds, and a run in one process does without

        from fedpeft.simulation.start_ray import start_ray

        with sigterm_kept():  # because Ray sets a handler of its own, which aborts
            ours = start_ray(runtime)
    try:
        done.result()
        from fedpeft.simulation.ray import RayGrid  # torch comes with it

        cores = runtime.num_cpus, runtime.num_gpus, runtime.total_cpus
        with RayGrid(num_clients, *cores) as grid:
            yield grid
    finally:
        if ours:
            ray.shutdown()


def simulate(grid: "LocalGrid", overrides: Sequence[str], display: Display) -> dict[str, Any]:
    """Run one configuration on a local grid and return its summary.

    Args:
        grid: gets as many nodes as the configuration has clients.
        overrides: the configuration.
        display: shows the rounds.
    """
    from fedpeft.engine.engine import open_engine  # torch comes with it
    from fedpeft.server.app import serve

    settings = configuration.settings(overrides)
    if (summary := finished(composed(overrides))) is not None:
        return summary
    sent = for_clients(overrides)
    grid.prepare(sent)
    engine = open_engine(sent, None)
    left_over = engine.rows.left_over()  # an impossible partition ends the run here
    label = type(engine.config.method).__name__
    with run_path(settings.run_dir, label) as path:
        grid.num_clients = engine.config.num_clients
        grid.state_folder, grid.groups = Path(path).resolve() / "clients", engine.groups
        rest = [o for o in split(overrides) if not o.startswith("run_dir=")]
        return serve(grid, [*rest, f"run_dir={quoted(path)}"], display, notes=left_over)


# A run may fail in these ways and leave other runs alone.
FAILURES = (ValueError, TimeoutError, RuntimeError, FloatingPointError)


def run_all(
    runs: Sequence[Sequence[str]],
    display: Callable[[], Display] = Display,
    tally: Tally | None = None,
) -> list[dict[str, Any] | Exception]:
    """Run configurations one after another on the same workers.

    A wrong configuration ends them all before the first one starts. A run that fails later does
    not end the others, unless the reason lies outside of it, such as a full disk.

    Args:
        runs: overrides of each run.
        display: makes the display of one run.
        tally: counts the runs and is shown after each; null to show none.

    Returns:
        For each run, in order, its summary or the error that ended it.

    Raises:
        InUse: another process is at work on one of the runs.
    """
    for overrides in runs:
        check_early(overrides)
    first = configuration.settings(runs[0])
    outcomes: list[dict[str, Any] | Exception] = []
    with local_grid(first.num_clients, first.runtime, lambda: check_loaded(runs)) as grid:
        for overrides in runs:
            shown = display()
            try:
                outcomes.append(simulate(grid, overrides, shown))
            except InUse:  # another command works on the same runs, so their outcomes are its own
                raise
            except FAILURES as error:
                outcomes.append(error)
                if tally:
                    shown.show(f"failed: {error}")
            if tally:
                tally.add(failed=isinstance(outcomes[-1], Exception))
                shown.show(tally.text())
    return outcomes


def run(overrides: str | Sequence[str], display: Display | None = None) -> dict[str, Any]:
    """Run one configuration with virtual clients on this machine and return its summary.

    Args:
        overrides: overrides of the configuration, e.g. ``["method=scl", "num_clients=4"]``.
        display: shows the rounds; null for one on standard output.

    Raises:
        ValueError: something about the configuration, the model or the data is wrong.
        RuntimeError: no client could train.
    """
    listed = split(overrides)
    (outcome,) = run_all([listed], lambda: display or Display())
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
